"""Errors beside those of the local buffer."""

from ray.exceptions import RayTaskError

from per_td.errors import PerTdError


class ShardError(PerTdError, RuntimeError):
    """Shards do not answer, or did not start."""


def raised_by(error: RayTaskError) -> Exception:
    """The error that a shard raised: without Ray's traceback if it is one of per_td's."""
    cause = error.cause
    return cause if isinstance(cause, PerTdError) else error
