"""Errors that per_td raises, all derived from `PerTdError`, and its warning.

A message says what was expected and what came. The buffer is as it was before the call.
"""


class PerTdError(Exception):
    """Root of all errors raised by per_td."""


class ConfigurationError(PerTdError, ValueError):
    """An argument of a constructor or a call, or a setting, is not accepted."""


class SchemaError(PerTdError, ValueError):
    """Transitions have other keys, shapes or dtypes than those in the buffer."""


class PriorityError(PerTdError, ValueError):
    """Priorities or TD errors have the wrong shape or dtype, or are NaN, infinite or negative."""


class IndexRangeError(PerTdError, IndexError):
    """An index has the wrong dtype, or names no filled slot."""


class EmptyBufferError(PerTdError, RuntimeError):
    """No transition can be drawn, or too few."""


class CheckpointError(PerTdError, RuntimeError):
    """A saved state is damaged, or does not fit this buffer."""


class AllocationError(PerTdError, MemoryError):
    """There is not enough memory; nothing has changed."""


class DiskAllocationError(PerTdError, OSError):
    """There is not enough space on a disk; nothing has changed."""


class KernelWarning(UserWarning):
    """Compiled kernels cannot run; plain torch takes over, with the same results."""
