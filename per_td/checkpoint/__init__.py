"""Checkpoints: the state of a buffer, and the files that hold it."""
