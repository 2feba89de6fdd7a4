"""Kernels for CUDA in Triton, compiled when they are first used, and kept in its cache on disk."""
