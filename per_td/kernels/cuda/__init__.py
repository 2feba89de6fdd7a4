"""The CUDA kernels, compiled by Triton when they are first used, and kept in its cache on disk."""

from per_td.kernels.cuda.draw import draw, find, weigh
from per_td.kernels.cuda.nodes import Trees
from per_td.kernels.cuda.update import assign, put

__all__ = ["Trees", "assign", "draw", "find", "put", "weigh"]
