"""Every error that per_td raises on purpose, all derived from `PerTdError`; and its warning."""


class PerTdError(Exception):
    """Root of all errors raised by per_td."""


class ConfigurationError(PerTdError, ValueError):
    """A constructor argument or a setting is not one of those accepted."""


class SchemaError(PerTdError, ValueError):
    """Transitions whose keys, shapes or dtypes are not those of the storage."""


class PriorityError(PerTdError, ValueError):
    """Priorities or TD errors of the wrong shape or dtype, or NaN, infinite or negative ones."""


class IndexRangeError(PerTdError, IndexError):
    """An index of the wrong dtype, or one that names no filled slot."""


class EmptyBufferError(PerTdError, RuntimeError):
    """There is nothing, or not enough, to draw from."""


class CheckpointError(PerTdError, RuntimeError):
    """A saved state that cannot be loaded into this buffer."""


class AllocationError(PerTdError, MemoryError):
    """There is not enough memory. Whatever asked for it is as it was before."""


class DiskAllocationError(PerTdError, OSError):
    """There is not enough space on a disk. Whatever asked for it is as it was before."""


class KernelWarning(UserWarning):
    """Compiled kernels cannot be used; plain torch takes over, with the same results."""
