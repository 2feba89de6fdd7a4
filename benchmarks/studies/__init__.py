"""Studies of learning, and of what cannot be measured here: see docs/."""
