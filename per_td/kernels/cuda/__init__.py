"""Kernels for CUDA in Triton, compiled at first use, and cached on disk."""
