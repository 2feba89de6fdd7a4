"""The actors of the shards: started, or found by their name, and ended."""

from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError
from tensordict import TensorDict

from per_td.errors import ConfigurationError
from per_td.ray import wire
from per_td.ray.shard import Shard
from per_td.ray.wire import ShardError, Told, tell
from per_td.ray.writer import checked
from per_td.storage.structure import Structure

_NAMES = {"capacity": "capacity_per_shard", "device": "shard_device", "folder": "checkpoint_dir"}
"""Names of arguments, by those of the settings of a shard."""


def start(
    seeds: list[int],
    settings: dict[str, Any],
    *,
    folder: Path | None,
    name: str | None,
    options: dict[str, Any],
    timeout_s: float,
    told: Told | None,
    **others: Any,
) -> tuple[list[Any], list[Any]]:
    """Start an actor per seed; with a name, those that are there already are used.

    Arguments of actors are small and by value: Ray hands them to a restarted one again. Shards that
    are there must have the same `settings` and `others`, arguments of `Shard`. Returns all shards,
    and those of them that were started here; on an error, those have been ended.
    """
    remote, answers = ray.remote(Shard), []
    shards: list[Any] = []
    started: list[Any] = []
    try:
        for number, seed in enumerate(seeds):
            place = None if folder is None else str(folder / f"shard-{number:05d}")
            arguments = others | {"folder": place}
            own = {"max_restarts": -1} | options
            if name is not None:
                own |= {"name": f"{name}-{number}", "lifetime": "detached", "get_if_exists": False}
            try:
                actor = remote.options(**own)
                shard = actor.remote(settings, seed=seed, told=told, **arguments)
                started.append(shard)
            except (TypeError, ValueError) as error:
                shard = None if name is None else _find(own)
                if shard is None:
                    raise ConfigurationError(
                        f"actor_options: expected options that Ray takes, got {options}: {error}"
                    ) from error
                answers.append(shard.differences.remote(settings | arguments))
            shards.append(shard)
        for differences in answers_of(answers, timeout_s):
            _require_none(differences, name)
    except BaseException:
        end(started)
        raise
    return shards, started


def end(shards: list[Any]) -> None:
    """End actors for good."""
    for shard in shards:
        ray.kill(shard, no_restart=True)


def answers_of(answers: list[Any], timeout_s: float) -> list[Any]:
    """Wait for the answers of all shards; ShardError if one is lost, or late after `timeout_s`."""
    try:
        found: list[Any] = wire.get(answers, timeout=timeout_s)
    except (RayActorError, GetTimeoutError) as error:
        raise ShardError(f"expected answers of all shards, got {error}") from error
    return found


def device_of(device: Any) -> torch.device | int:
    """Check a device of shards, which other machines may have, and this one not."""
    if type(device) is int and device >= 0:
        return device
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError) as error:
        raise ConfigurationError(f"shard_device: expected a device, got {device!r}") from error
    if found.type == "meta":
        raise ConfigurationError("shard_device: expected one that holds values, got meta")
    return found


def small(example: Any) -> tuple[TensorDict, Told]:
    """Make an example of the same kind that takes little memory, and its structure."""
    leaves, structure = checked(example, batched=False)
    told = tell(structure)
    zeros = [
        (key, torch.zeros((), dtype=leaf.dtype, device="cpu").expand(leaf.shape[1:]))
        for key, leaf in leaves.items()
    ]
    plain = Structure.from_state(told.nodes)
    return plain.assembled(zeros, {}, torch.Size([]), torch.device("cpu")), told


def _find(options: dict[str, Any]) -> Any:
    """The actor of the name in Ray's `options`, if there is one."""
    try:
        return ray.get_actor(options["name"], options.get("namespace"))
    except ValueError:
        return None


def _require_none(differences: dict[str, tuple[Any, Any]], name: str | None) -> None:
    """Raise ConfigurationError if a shard has other settings than those asked for."""
    if differences:
        each = (
            f"{_NAMES.get(setting, setting)} is {has!r}, asked for {asked!r}"
            for setting, (has, asked) in differences.items()
        )
        raise ConfigurationError(
            f"name: expected shards {name!r} with the settings asked for, got others:"
            f" {'; '.join(each)}"
        )
