"""Checks of a saved state, before any of it is loaded."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.errors import CheckpointError, ConfigurationError
from per_td.priorities.distributions import PRIORITIZATIONS
from per_td.priorities.schedules import as_schedule
from per_td.priorities.selection import Selection
from per_td.priorities.table import CHOICES, as_clip, check_choices
from per_td.storage.frame_store import GONE, depths_of
from per_td.storage.leaves import flattened, named
from per_td.storage.structure import Structure


def check_values(state: Mapping[str, Any]) -> None:
    """Check types, shapes and values of a state that has all keys, or raise CheckpointError."""
    settings = _settings(state["settings"])
    capacity, many = settings["capacity"], settings.get("num_buffers")
    each = () if many is None else (many,)
    written = _count("write_count", state["write_count"], each)
    beta = state["beta"]  # one, or one for each buffer
    _real("beta", beta, each if getattr(beta, "ndim", 0) else (), high=1.0)
    _real("ever_max", state["ever_max"], each, high=torch.finfo(torch.float32).max)
    _count("stale_updates", state["stale_updates"], ())
    _count("refused_priorities", state["refused_priorities"], ())
    _count("updates", state.get("updates", 0), ())
    filled = min(int(written.max()), capacity)
    slots = (filled,) if many is None else (many, capacity)
    _real("priority", state["priority"], slots)
    if state.get("mass") is not None:
        _real("mass", state["mass"], slots)
    if state.get("draw_count") is not None:
        counts = _tensor("draw_count", state["draw_count"], slots, (torch.int32,))
        if not (counts >= 0).all():
            raise _wrong("draw_count", "counts of at least 0", "negative ones")
    for name in ("epoch", "written_before"):
        _count(name, state.get(name, 0), ())
    _transitions(state["transitions"], (*each, filled))
    _structure(state.get("structure", "[]"), state["transitions"])
    if "replayed" in state:
        kept = (filled,) if many is None else None  # unused with many buffers
        _tensor("replayed", state["replayed"], kept, (torch.bool,))
    if state.get("frames") is not None:
        _frames(state["frames"], settings, flattened(state["transitions"]), filled)
    if state.get("ranks") is not None:
        _ranks(state["ranks"], filled)
    if state["generator"] is not None:
        _tensor("generator", state["generator"], None, (torch.uint8,))


def _wrong(name: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(f"{name}: expected {expected} in the state, got {got}")


def _settings(settings: Any) -> Mapping[str, Any]:
    wanted = ("capacity", "alpha", "eps", "beta_increment")
    others = {"batch_size", "num_buffers", "prioritization", "sort_interval"}
    others |= {"priority_clip", "uniform_mix", "latest", "track_draws", "beta_schedule"}
    others |= {"frames", "num_envs", "num_frames"}
    if not isinstance(settings, Mapping) or any(key not in settings for key in wanted):
        raise _wrong("settings", f"a dict with {', '.join(wanted)}", type(settings).__name__)
    try:
        validation.positive_int("capacity", settings["capacity"])
        if settings.get("num_buffers") is not None:
            validation.positive_int("num_buffers", settings["num_buffers"])
        if "prioritization" in settings:
            validation.one_of("prioritization", settings["prioritization"], PRIORITIZATIONS)
        if "frames" in settings:
            depths_of(settings["frames"])
        for name in ("batch_size", "sort_interval", "num_envs", "num_frames"):
            if settings.get(name) is not None:
                validation.positive_int(name, settings[name])
        chosen = {name: settings.get(name, choices[0]) for name, choices in CHOICES.items()}
        check_choices(
            settings["capacity"], chosen | {"uniform_mix": settings.get("uniform_mix", 0.0)}
        )
        if unknown := settings.keys() - {*wanted, *CHOICES, *others}:
            raise ConfigurationError(f"expected those of a buffer, got also {sorted(unknown)}")
        validation.real_or_each("alpha", settings["alpha"], settings.get("num_buffers"))
        validation.real("eps", settings["eps"], high=torch.finfo(torch.float32).max)
        validation.real("beta_increment", settings["beta_increment"])
        as_clip(settings.get("priority_clip"))
        Selection.of("priority", None, settings.get("latest", 0), chosen["draw"])
        validation.flag("track_draws", settings.get("track_draws", False))
        schedule = as_schedule(settings.get("beta_schedule"))
        if schedule is not None and settings["beta_increment"]:
            raise ConfigurationError("beta_schedule: expected None with a beta_increment, got one")
    except ConfigurationError as error:
        raise CheckpointError(f"settings: {error}") from error
    return settings


def _structure(structure: Any, transitions: Any) -> None:
    """Refuse nodes that cannot be those of the transitions."""
    leaves = flattened(transitions)
    try:
        nodes = Structure.from_state(structure).nodes
    except ValueError as error:
        raise _wrong("structure", "JSON of nodes", str(error)) from error
    for key in nodes:
        for end in range(1, len(key) + 1):
            if key[:end] in leaves:
                raise _wrong("structure", f"no node at the tensor {named(key[:end])}", named(key))


def _tensor(
    name: str, value: Any, shape: tuple[int, ...] | None, dtypes: tuple[torch.dtype, ...]
) -> Tensor:
    if not isinstance(value, Tensor):
        raise _wrong(name, "a tensor", type(value).__name__)
    validation.require_plain(name, value, CheckpointError)
    if value.dtype not in dtypes or (shape is not None and value.shape != shape):
        kinds = " or ".join(map(str, dtypes))
        expected = kinds if shape is None else f"{kinds} of shape {list(shape)}"
        raise _wrong(name, expected, f"{value.dtype} of shape {list(value.shape)}")
    return value


def _real(name: str, value: Any, shape: tuple[int, ...], high: float = math.inf) -> None:
    tensor = _tensor(name, value, shape, (torch.float32, torch.float64))
    if not (tensor.isfinite() & (tensor >= 0) & (tensor <= high)).all():
        raise _wrong(name, f"finite values in [0, {high:g}]", "others")


def _count(name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(value, int) and not isinstance(value, bool) and not shape and value < 2**63:
        value = torch.tensor(value, dtype=torch.int64, device="cpu")
    tensor = _tensor(name, value, shape, (torch.int64,))
    if not (tensor >= 0).all():
        raise _wrong(name, "counts of at least 0", "negative ones")
    return tensor


def _transitions(transitions: Any, rows: tuple[int, ...]) -> None:
    if not isinstance(transitions, Mapping):
        raise _wrong("transitions", "a dict", type(transitions).__name__)
    leaves = flattened(transitions)
    if rows[-1] and not leaves:
        raise _wrong("transitions", f"tensors of shape {[*rows]}", "none")
    for key, leaf in leaves.items():
        if not isinstance(leaf, Tensor):
            raise _wrong(f"transitions, {named(key)}", "a tensor", type(leaf).__name__)
        validation.require_plain(named(key), leaf, CheckpointError)
        if leaf.shape[: len(rows)] != rows:
            raise _wrong(f"transitions, {named(key)}", f"shape {[*rows]}", list(leaf.shape))


def _ranks(ranks: Any, filled: int) -> None:
    wanted = ("mass", "snapshot", "changes")
    if not isinstance(ranks, Mapping) or any(key not in ranks for key in wanted):
        raise _wrong("ranks", f"a dict with {', '.join(wanted)}", type(ranks).__name__)
    _real("ranks, mass", ranks["mass"], (filled,))
    _real("ranks, snapshot", ranks["snapshot"], (filled,))
    _count("ranks, changes", ranks["changes"], ())


def _frames(frames: Any, settings: Any, leaves: Mapping[Any, Tensor], filled: int) -> None:
    """Refuse frames that are not those of the transitions."""
    if not isinstance(frames, Mapping) or not {"retired", "stores"} <= frames.keys():
        raise _wrong("frames", "a dict with retired, stores", type(frames).__name__)
    if "frames" not in settings or settings.get("num_buffers") is not None:
        raise _wrong("frames", "none, as in the settings", "some")
    _count("frames, retired", frames["retired"], ())
    depths, stores = depths_of(settings["frames"]), frames["stores"]
    names = [str(k) for k in range(len(depths))] if leaves else []
    if not isinstance(stores, Mapping) or [*stores] != names:
        raise _wrong("frames, stores", f"a dict with {names}", stores)
    for (key, depth), entry in zip(depths.items(), stores.values(), strict=False):
        name, wanted = f"frames of {named(key)}", ("frames", "stored", "size", "low")
        if not isinstance(entry, Mapping) or any(part not in entry for part in wanted):
            raise _wrong(name, f"a dict with {', '.join(wanted)}", type(entry).__name__)
        size = int(_count(f"{name}, size", entry["size"], ()))
        kept = min(int(_count(f"{name}, stored", entry["stored"], ())), size)
        gone = _count(f"{name}, low", entry["low"], (filled,)) == GONE
        held = entry["frames"]
        if not isinstance(held, Tensor) or held.ndim < 1 or len(held) != kept:
            raise _wrong(name, f"a tensor of {kept} frames", type(held).__name__)
        validation.require_plain(name, held, CheckpointError)
        for each in (key, ("next", *key)):
            places = _tensor(named(each), leaves.get(each), (filled, depth), (torch.int32,))
            right = (places >= 0) & ((places < kept) | gone.unsqueeze(-1))
            if not right.all():
                raise _wrong(named(each), f"references to {kept} frames", "others")
