"""What may go wrong beside the errors of the local buffer."""

from per_td.errors import PerTdError

__all__ = ["ShardError"]


class ShardError(PerTdError, RuntimeError):
    """Shards that do not answer."""
