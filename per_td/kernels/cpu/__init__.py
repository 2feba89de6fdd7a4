"""Kernels for the CPU in numba, compiled when this is imported, or read from numba's cache."""
