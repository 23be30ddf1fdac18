"""Models with a head over a pruned decoder: what only they know of a call."""
