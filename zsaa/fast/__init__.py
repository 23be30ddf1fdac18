"""The fast path: the same numbers sooner. The method asks `dispatch` what may be used, and runs without any of it."""
