"""Errors that per_td raises, all derived from `PerTdError`, and its warning."""


class PerTdError(Exception):
    """Root of all errors raised by per_td."""


class ConfigurationError(PerTdError, ValueError):
    """A constructor argument or a setting is not accepted."""


class SchemaError(PerTdError, ValueError):
    """Transitions have other keys, shapes or dtypes than the storage."""


class PriorityError(PerTdError, ValueError):
    """Priorities or TD errors have the wrong shape or dtype, or are NaN, infinite or negative."""


class IndexRangeError(PerTdError, IndexError):
    """An index has the wrong dtype, or names no filled slot."""


class EmptyBufferError(PerTdError, RuntimeError):
    """Too few transitions can be drawn, or none."""


class CheckpointError(PerTdError, RuntimeError):
    """A saved state cannot be loaded into this buffer."""


class AllocationError(PerTdError, MemoryError):
    """There is not enough memory; nothing has changed."""


class DiskAllocationError(PerTdError, OSError):
    """There is not enough space on a disk; nothing has changed."""


class KernelWarning(UserWarning):
    """Compiled kernels cannot run; plain torch takes over, with the same results."""
