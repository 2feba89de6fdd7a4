"""The CPU kernels, compiled when this is imported, or read from numba's cache on disk."""

from per_td.kernels.draw import find, sample
from per_td.kernels.rows import gather, scatter
from per_td.kernels.stamps import append, settle
from per_td.kernels.update import assign, put, rebuild, renew

__all__ = [
    "append",
    "assign",
    "find",
    "gather",
    "put",
    "rebuild",
    "renew",
    "sample",
    "scatter",
    "settle",
]
