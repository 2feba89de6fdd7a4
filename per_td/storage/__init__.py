"""Storage: the transitions, in rings of preallocated memory."""
