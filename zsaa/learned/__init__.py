"""Scores that were taught: children of the decoder that say, in place of attention, which tokens go on."""
