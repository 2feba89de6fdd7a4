"""Numbers that kernels and their callers agree on."""

EXPONENT, EPS, MINIMA, BETAS = range(4)
"""Places in a table's settings, float64 [4]: the exponent that gives the masses of all trees, NaN
where each has its own; eps; 1 if the smallest masses are kept up to date; 1 if each tree has a beta
of its own."""

VALUE, GENERATION, MASK, STAMPS, ADD_EPS, SQUARED, NEW, EVER_MAX = (1 << k for k in range(8))
"""Options of `assign`, a bit each; one is unset where its argument is absent."""

STRATIFIED, BY_SIZE, BY_BUFFER = (1 << k for k in range(3))
"""Options of `draw`."""
