"""Starting the shards as Ray actors, and asking all of them at once."""

import os
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from per_td.ray.errors import ShardError
from per_td.ray.shard import Shard
from per_td.ray.writer import told_by

__all__ = ["answers_of", "start"]


def start(
    num_shards: int,
    settings: dict[str, Any],
    *,
    generator: torch.Generator | None,
    folder: str | os.PathLike[str] | None,
    name: str | None,
    options: dict[str, Any],
    **durable: Any,
) -> list[Any]:
    """The actors; with a name, those that are there already, if there are.

    Args:
        num_shards: how many.
        settings: of each shard's buffer.
        generator: source of the seeds of their draws: torch's own is the same in every process.
        folder: for their checkpoints and logs.
        name: see `ShardedReplayBuffer`.
        options: Ray's, of each actor.
        durable: other arguments of `Shard`.
    """
    remote = ray.remote(Shard)
    seeds = torch.randint(2**62, (num_shards,), generator=generator, device="cpu").tolist()
    shards = []
    for number, seed in enumerate(seeds):
        own = {"max_restarts": -1} | options
        if name is not None:
            own |= {"name": f"{name}-{number}", "lifetime": "detached", "get_if_exists": True}
        place = None
        if folder is not None:
            place = os.fspath(Path(folder).absolute() / f"shard-{number:05d}")
        shards.append(remote.options(**own).remote(settings, seed=seed, folder=place, **durable))
    return shards


def answers_of(answers: list[Any], timeout_s: float) -> list[Any]:
    """The answers of all shards.

    Raises:
        ShardError: a shard is lost, or takes longer than `timeout_s` seconds.
    """
    try:
        found: list[Any] = ray.get(answers, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        raise ShardError(f"expected answers of all shards, got {error}") from error
    except RayTaskError as error:
        raise told_by(error) from None
    return found
