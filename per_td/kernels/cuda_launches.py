"""The CUDA kernels, compiled by Triton when they are first used, and kept in its cache on disk."""

from per_td.kernels.cuda_draw import draw, find, weigh
from per_td.kernels.cuda_nodes import Trees
from per_td.kernels.cuda_update import assign, put

__all__ = ["Trees", "assign", "draw", "find", "put", "weigh"]
