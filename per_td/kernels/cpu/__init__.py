"""The CPU kernels, compiled when this is imported, or read from numba's cache on disk."""

from per_td.kernels.cpu.draw import find, sample
from per_td.kernels.cpu.rows import gather, scatter
from per_td.kernels.cpu.stamps import append, settle
from per_td.kernels.cpu.update import assign, put, rebuild, renew

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
