"""With kernels and without: the values of PER_TD_KERNELS that tests set."""

import os

COMPILED = "checked" if os.environ.get("PER_TD_KERNELS") == "checked" else "auto"
"""Kernels as the environment asks for them: a process compiles them once, one way or the other."""

CHOICES = (COMPILED, "off")
