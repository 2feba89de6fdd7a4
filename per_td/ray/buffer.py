"""ShardedReplayBuffer: one prioritized buffer over many Ray actors, as the learner sees it."""

import os
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from per_td import validation
from per_td.buffer import PrioritizedReplayBuffer
from per_td.errors import ConfigurationError
from per_td.priorities.schedules import LinearSchedule
from per_td.priorities.table import as_mode
from per_td.ray import actors, saving, wire
from per_td.ray.batches import Batches, Request
from per_td.ray.exchange import Ledger, Replies, Updates, checked_update
from per_td.ray.shard import EXACT, LIVE, Report
from per_td.ray.wire import ShardError
from per_td.ray.writer import Receipt, Writer
from per_td.storage.leaves import entries_of

_DRAWS = ("independent", "stratified")
_OF_SHARDS = (*LIVE, "weight_normalization", "new_priority", "draw", "track_draws")
"""Settings that each shard has too."""

_FRAMES = "shards keep whole stacks; PrioritizedReplayBuffer(frames=...) keeps each frame once"


def _require_default(name: str, given: object, default: object) -> None:
    """Refuse a way to draw that no shard can follow by itself."""
    if given != default:
        raise ConfigurationError(
            f"{name}: expected {default!r}, got {given!r}: a shard does not know what the others"
            " hold, see docs/ray.md"
        )


def _refused(name: str) -> Any:
    """An attribute that is None, and cannot be set."""
    return validation.fixed(name, lambda self: None, _FRAMES)


def _of_rules(name: str, doc: str, *, sent: bool = False) -> Any:
    """A setting that `_rules` keeps and checks; a change of one that is `sent` goes to the shards.

    Updates go first: they were made with the value of before.
    """

    def change(self: "ShardedReplayBuffer", value: Any) -> None:
        setattr(self._rules, name, value)
        if sent:
            self._updates.send()
            self._configure()

    return property(lambda self: getattr(self._rules, name), change, doc=doc)


class ShardedReplayBuffer:
    """One prioritized buffer whose transitions live in Ray actors, the shards.

    Each batch is distributed over the shards in proportion to their total masses. The weights
    follow from the probability with which each transition was drawn. Writers in any actor or task
    write to the shards directly; one learner samples and updates. See docs/ray.md. `len(buffer)` is
    the number of transitions in the living shards. A `with` statement closes the buffer at its end.

    Args:
        num_shards: number of shards.
        capacity_per_shard: number of slots of each shard.
        batch_size: default batch size of `sample`.
        alpha, beta, eps, beta_increment, weight_normalization, priority_clip: as in
            `PrioritizedReplayBuffer`; alpha and beta are numbers.
        new_priority: as in `PrioritizedReplayBuffer`, but each shard knows only its own priorities.
        draw: "independent" or "stratified".
        track_draws: let the shards count how often each transition was drawn. Batches then contain
            "draw_count", int32 [B], which includes draws of batches that the learner never took.
        beta_schedule: a `LinearSchedule` of beta, counted in this object's calls of
            `update_priority`.
        uniform_mix, latest: must be 0; docs/ray.md gives the reason.
        frames, num_envs, num_frames: must be None; shards keep whole stacks.
        layout: as in `PrioritizedReplayBuffer`.
        example: one transition; shards then refuse others from the beginning.
        shard_device: device of the transitions and priorities. For "cuda", ask Ray for GPUs in
            `actor_options`.
        device: device of the batches; None is torch's default device.
        generator: source of the counts and of the seeds of the shards' draws, on the CPU; None is
            torch's own.
        prefetch: smallest number of batches that are asked for ahead. They do not see later
            updates.
        batches_per_request: number k of batches in a request to a shard, and of updates in a
            message to it. None: `prefetch`, or 1 without. All k batches are drawn from the
            priorities at the time of the request. Updates with generations wait in the learner
            until there are k of them, or until the next request, a late shard, or a call that
            asks all shards, such as `flush`, `stats`, `save` and `close`.
        timeout_s: seconds that a batch waits for a shard. Then its part is drawn from the others.
        refresh_s: a shard that was silent for this number of seconds is asked for a report.
        start_timeout_s: seconds that the shards may take to start and restore their state.
        checkpoint_dir: folder for checkpoints and logs, which must be reachable wherever a shard
            may start. A shard that starts again, also in another run, restores all acknowledged
            changes from it. None: such shards are empty.
        checkpoint_every: number of transitions that a shard writes between two checkpoints; None:
            its capacity.
        fsync: acknowledge a change only when it is on the disk.
        name: keeps the shards alive after this process ends. A later learner with the same name
            (and Ray namespace) finds them; it must pass the settings that they have.
        actor_options: Ray's options of the actors, such as num_cpus, num_gpus, resources and
            scheduling_strategy. `max_restarts` is -1 unless given.

    Raises:
        ConfigurationError: an argument is not accepted, or shards of this name have other
            settings; the error names both.
        SchemaError: `example` is not one transition.
        ShardError: the shards did not start.
    """

    def __init__(
        self,
        num_shards: int,
        capacity_per_shard: int,
        batch_size: int | None = None,
        *,
        alpha: float = 0.6,
        beta: float = 0.4,
        eps: float = 1e-6,
        beta_increment: float = 0.0,
        weight_normalization: str = "batch",
        new_priority: str = "buffer_max",
        draw: str = "independent",
        priority_clip: tuple[float | None, float | None] | None = None,
        track_draws: bool = False,
        beta_schedule: LinearSchedule | None = None,
        uniform_mix: float = 0.0,
        latest: int = 0,
        frames: None = None,
        num_envs: None = None,
        num_frames: None = None,
        layout: str = "auto",
        example: TensorDictBase | None = None,
        shard_device: torch.device | str | int = "cpu",
        device: torch.device | str | int | None = None,
        generator: torch.Generator | None = None,
        prefetch: int = 0,
        batches_per_request: int | None = None,
        timeout_s: float = 5.0,
        refresh_s: float = 1.0,
        start_timeout_s: float = 300.0,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        fsync: bool = False,
        name: str | None = None,
        actor_options: dict[str, Any] | None = None,
    ) -> None:
        self._num_shards = num_shards = validation.positive_int("num_shards", num_shards)
        _require_default("uniform_mix", uniform_mix, 0)
        _require_default("latest", latest, 0)
        given = {"frames": frames, "num_envs": num_envs, "num_frames": num_frames}
        for argument, value in given.items():
            if value is not None:
                raise ConfigurationError(f"{argument}: expected None, got {value!r}: {_FRAMES}")
        # Holds settings, and refuses arguments that a shard would refuse; it never gets data
        self._rules = PrioritizedReplayBuffer(
            1,
            batch_size,
            beta=beta,
            beta_increment=beta_increment,
            device="cpu",
            example=example,
            alpha=alpha,
            eps=eps,
            weight_normalization=weight_normalization,
            new_priority=new_priority,
            draw=validation.one_of("draw", draw, _DRAWS),
            priority_clip=priority_clip,
            track_draws=track_draws,
            beta_schedule=beta_schedule,
            layout=layout,
        )
        self._settings: dict[str, Any] = {
            **{name: getattr(self._rules, name) for name in _OF_SHARDS},
            "layout": layout,
            "capacity": validation.positive_int("capacity_per_shard", capacity_per_shard),
            "device": actors.device_of(shard_device),
        }
        self._generator = validation.as_generator(generator, torch.device("cpu"))
        self._device = validation.resolve_device(device, sums=False)
        self._prefetch = validation.integer("prefetch", prefetch, 0)
        self._per_request = validation.positive_int(
            "batches_per_request",
            max(self._prefetch, 1) if batches_per_request is None else batches_per_request,
        )
        self._timeout_s = validation.real("timeout_s", timeout_s)
        self._start_timeout_s = validation.real("start_timeout_s", start_timeout_s)
        refresh_s = validation.real("refresh_s", refresh_s)
        if checkpoint_every is not None:
            checkpoint_every = validation.positive_int("checkpoint_every", checkpoint_every)
        kept = None
        if checkpoint_dir is not None:
            kept = saving.as_path("checkpoint_dir", checkpoint_dir).absolute()
        if name is not None and not (isinstance(name, str) and name):
            raise ConfigurationError(f"name: expected a name for the shards, got {name!r}")
        if not isinstance(actor_options, Mapping | None):
            raise ConfigurationError(
                f"actor_options: expected a dict of Ray's options, got {actor_options!r}"
            )
        like, told = (None, None) if example is None else actors.small(example)
        # torch's own generator is the same in every process
        seeds = torch.randint(2**62, (num_shards,), generator=generator, device="cpu")
        self._shards, self._started = actors.start(
            seeds.tolist(),
            self._settings | {"example": like},
            folder=kept,
            name=name,
            options=dict(actor_options or {}),
            timeout_s=self._start_timeout_s,
            told=told,
            fsync=bool(fsync),
            checkpoint_every=checkpoint_every,
            num_shards=num_shards,
        )
        self._ledger = Ledger(num_shards)
        self._replies = Replies(self._shards, self._ledger, self._configure, refresh_s=refresh_s)
        self._updates = Updates(
            self._shards, self._ledger, self._replies, per_message=self._per_request
        )
        self._batches = Batches(
            self._shards,
            self._ledger,
            self._replies,
            draw=draw,
            weight_normalization=weight_normalization,
            generator=generator,
            timeout_s=self._timeout_s,
            device=self.device,
            on_late=self._updates.send,
        )
        self._ahead: deque[Request] = deque()
        self._writer = self.writer(0)
        self._take_up([shard.report.remote() for shard in self._shards])

    @contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        """On an error, end the shards that this object started, and no others."""
        try:
            yield
        except BaseException:
            actors.end(self._started)
            raise

    def _take_up(self, answers: list[Any]) -> None:
        """Wait for the reports of all shards; where one fails, end those started here."""
        with self._ending_on_error():
            for shard, report in enumerate(self._get(answers)):
                self._replies.note(shard, report)

    def _get(self, answers: list[Any]) -> list[Any]:
        """The answers of all shards; ShardError if one is lost, or late after `start_timeout_s`."""
        return actors.answers_of(answers, self._start_timeout_s)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.num_shards} shards of {self._settings['capacity']} slots,"
            f" alpha={self.alpha:g}, beta={self.beta:g}, eps={self.eps:g})"
        )

    def __len__(self) -> int:
        """Ask the living shards for the number of their transitions."""
        self._hear()
        return self._ledger.size

    def __enter__(self) -> "ShardedReplayBuffer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Send all updates, then end the shards, also those with a name. Their folders remain.

        It waits up to `timeout_s` for a shard that does not answer.

        Raises:
            IndexRangeError: a shard refused an index of an update; the shards have ended all the
                same.
        """
        try:
            self.flush()
        except ShardError:
            pass  # these updates are lost with the shard
        finally:
            actors.end(self._shards)

    def _hear(self) -> None:
        """Send what is held back, and wait for a report of each shard."""
        self._updates.send()
        self._replies.wait(self._timeout_s)

    # --- settings ---------------------------------------------------------------------------------

    num_shards: int = validation.fixed("num_shards", lambda self: self._num_shards)
    """Number of actors."""

    capacity: int = validation.fixed(
        "capacity", lambda self: self.num_shards * self._settings["capacity"]
    )
    """Number of slots in all shards."""

    device: torch.device = validation.fixed("device", lambda self: self._device)
    """Device of the batches."""

    generator: torch.Generator | None = validation.fixed("generator", lambda self: self._generator)
    """Source of the counts."""

    draw: str = validation.fixed("draw", lambda self: self._rules.draw)
    """Way to draw: "independent" or "stratified"."""

    weight_normalization: str = validation.fixed(
        "weight_normalization", lambda self: self._rules.weight_normalization
    )
    """Divisor of the weights."""

    new_priority: str = validation.fixed("new_priority", lambda self: self._rules.new_priority)
    """Priority of new transitions that bring none."""

    prefetch: int = validation.fixed("prefetch", lambda self: self._prefetch)
    """Smallest number of batches that are asked for ahead."""

    batches_per_request: int = validation.fixed(
        "batches_per_request", lambda self: self._per_request
    )
    """Number of batches in a request to a shard, and of updates in a message to it."""

    epsilon = validation.fixed("epsilon", instead="expected eps, which can be set")
    frames: None = _refused("frames")
    num_envs: None = _refused("num_envs")
    num_frames: None = _refused("num_frames")

    batch_size: int | None = _of_rules(
        "batch_size", "Default for `sample`; may be set at any time."
    )
    beta_increment: float = _of_rules(
        "beta_increment", "Added to beta by `increase_beta`, at least 0; may be set at any time."
    )
    beta: float = _of_rules("beta", "Exponent of the weights, in [0, 1]; may be set at any time.")

    def increase_beta(self) -> None:
        """Add `beta_increment` to beta, up to 1.

        Raises:
            ConfigurationError: there is a `beta_schedule`.
        """
        self._rules.increase_beta()

    beta_schedule: LinearSchedule | None = validation.fixed(
        "beta_schedule", lambda self: self._rules.beta_schedule
    )
    """Schedule that beta follows, or None."""

    track_draws: bool = validation.fixed("track_draws", lambda self: self._rules.track_draws)
    """True if draws are counted."""

    uniform_mix = validation.fixed("uniform_mix", instead="expected 0, see docs/ray.md")
    latest = validation.fixed("latest", instead="expected 0, see docs/ray.md")

    @property
    def alpha(self) -> float:
        """Exponent of the priorities. Setting it costs O(N) in the shards, and waits for them."""
        alpha: float = self._rules.alpha
        return alpha

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._rules.alpha = value
        self._ahead.clear()
        self._updates.send()
        self._configure()
        self._replies.wait(self._timeout_s)

    eps: float = _of_rules("eps", "Added to |TD error| by later updates.", sent=True)
    priority_clip: tuple[float | None, float | None] | None = _of_rules(
        "priority_clip", "Bounds of the priorities that later updates set.", sent=True
    )

    def _live(self) -> dict[str, Any]:
        """The settings of shards that may change, as they are now."""
        return {name: getattr(self._rules, name) for name in LIVE}

    def _configure(self, *shards: int) -> None:
        """Send the settings that may change to these shards, or to all."""
        for shard in shards or range(self.num_shards):
            answer = self._shards[shard].configure.remote(**self._live())
            self._replies.expect(answer, shard, 0)

    # --- writing ----------------------------------------------------------------------------------

    def writer(self, first: int = 0, *, timeout_s: float = 30.0) -> Writer:
        """Return a `Writer` for another actor or task.

        Args:
            first: number of the shard to begin with, modulo their number.
            timeout_s: seconds to wait for a shard before the next is tried.
        """
        return Writer(self._shards, first=first, timeout_s=timeout_s)

    def extend(self, transitions: Any, priority: Any = None) -> Receipt:
        """Write transitions from here, to one shard; see `Writer.extend`."""
        return self._writer.extend(transitions, priority)

    def add(self, transition: Any, priority: Any = None) -> Receipt:
        """Write one transition from here; see `Writer.add`."""
        return self._writer.add(transition, priority)

    # --- sampling and updating --------------------------------------------------------------------

    def sample(
        self, batch_size: int | None = None, by: str = "priority", newest: int | None = None
    ) -> TensorDict:
        """Draw a batch from all shards.

        Args:
            batch_size: number of transitions B. None: that of the constructor.
            by, newest: must be "priority" and None; docs/ray.md gives the reason.

        Returns:
            TensorDict [B] on `device`, shard after shard: the transitions, and the entries "index",
            "generation" (which also changes at each start of the shard) and "shard", int64,
            "priority_weight", float32, and with `track_draws` "draw_count", int32.

        Raises:
            ConfigurationError: there is no batch size, here or in the constructor, or `by` or
                `newest` has another value.
            EmptyBufferError: no living shard has a transition of positive priority.
            ShardError: all shards are lost or late; later calls may find them restarted.
            SchemaError: the shards hold different kinds of transitions.
        """
        _require_default("by", by, "priority")
        _require_default("newest", newest, None)
        n = self._rules._batch_size(batch_size)
        self._replies.listen()
        if self._ahead and self._ahead[0].n != n:
            self._ahead.clear()
        while sum(len(request.batches) for request in self._ahead) <= self._prefetch:
            self._updates.send()
            self._ahead.append(self._batches.request(n, self._per_request))
        request = self._ahead.popleft()
        batch = self._batches.collect(request, self.beta)
        if request.batches:
            self._ahead.appendleft(request)
        return batch

    def sweep(self, batch_size: int) -> Iterator[TensorDict]:
        """Raise ConfigurationError: shards can be written to at any time; see docs/ray.md."""
        raise ConfigurationError(
            f"sweep: expected no call with batch_size={batch_size}: shards, which are written to"
            " at any time, have no order of their slots together"
        )

    def update_priority(
        self,
        index: Any,
        td_error: Any,
        generation: Any = None,
        *,
        shard: Any,
        mode: str = "set",
        rate: float = 1.0,
    ) -> None:
        """Send new priorities, |td_error| + eps, to the shards, without waiting for them.

        `batches_per_request` says when they are sent.

        Args:
            index, td_error, generation, mode, rate: as in
                `PrioritizedReplayBuffer.update_priority`, [B].
            shard: "shard" of the batch, [B].

        Raises:
            ConfigurationError: there is no such mode, or a rate came with "set".
            IndexRangeError: shapes differ, or there is no such slot or shard. An empty slot raises
                in a later call, or in `flush`, and its shard refuses the whole message.
            PriorityError: a TD error is NaN or infinite. Nothing has been sent.
        """
        self._send(index, td_error, generation, shard, as_mode(mode, rate))
        self._rules._count_update()

    def set_priority(
        self, index: Any, priority: Any, generation: Any = None, *, shard: Any
    ) -> None:
        """Send raw priorities, without eps and not clipped, to the shards; 0 is never drawn.

        `batches_per_request` says when they are sent.

        Args:
            index: slots, [B].
            priority: finite and not negative, [B].
            generation, shard: see `update_priority`.

        Raises:
            IndexRangeError: as `update_priority`.
            PriorityError: as `update_priority`; a negative priority is refused like NaN.
        """
        self._send(index, priority, generation, shard, EXACT)

    def _send(
        self, index: Any, value: Any, generation: Any, shard: Any, how: dict[str, Any]
    ) -> None:
        """Check an update, and have it sent; see `Shard.update` for `how`."""
        capacity = self._settings["capacity"]
        checked = checked_update(
            index, value, generation, shard, self.num_shards, capacity, exact=how == EXACT
        )
        self._updates.add(*checked, how)
        self._replies.make_room(self._timeout_s)

    def update_tensordict_priority(self, batch: Any) -> None:
        """Call `update_priority` with entries of a batch.

        Args:
            batch: TensorDict [B] with "index", "shard", "td_error" and, if you have it,
                "generation".

        Raises:
            SchemaError: one of the first three is missing.
            IndexRangeError, PriorityError: as `update_priority`.
        """
        index, shard, td_error = entries_of(batch, "index", "shard", "td_error")
        self.update_priority(index, td_error, batch.get("generation", None), shard=shard)

    def flush(self) -> None:
        """Send the waiting updates, and wait until the shards have answered all of them.

        Raises:
            ShardError: a shard does not answer within `timeout_s`.
            IndexRangeError: a shard refused an index.
        """
        self._updates.send()
        self._replies.settle(self._timeout_s)

    # --- contents -------------------------------------------------------------------------------

    @property
    def priority(self) -> Tensor:
        """Raw priorities, float32 [len], shard after shard; this asks all shards."""
        self._updates.send()
        parts = self._get([shard.priority.remote() for shard in self._shards])
        return torch.cat([wire.tensor(part) for part in parts])

    @property
    def draw_count(self) -> Tensor:
        """Number of draws of each transition, int32 [len], in the order of `priority`.

        Raises:
            ConfigurationError: the buffer was made without `track_draws`.
        """
        if not self.track_draws:
            raise ConfigurationError(
                "draw_count: expected a buffer with track_draws=True, got one with False"
            )
        parts = self._get([shard.draw_count.remote() for shard in self._shards])
        return torch.cat([wire.tensor(part) for part in parts])

    def reports(self) -> list[Report | None]:
        """Ask each shard for a report of its state; None for a lost shard."""
        self._hear()
        pairs = zip(self._ledger.reports, self._ledger.living, strict=True)
        return [report if lives else None for report, lives in pairs]

    def stats(self) -> dict[str, int]:
        """Return counters since the start.

        Returns:
            "written", "stale_updates", "refused_priorities": sums over the shards, as last heard.
            "lost_updates": updates lost with their shard. "shards_living": living shards now.
            "shards_lost": number of times that a shard was lost or late.
        """
        self._hear()
        return {
            "written": self._ledger.sum("written"),
            "stale_updates": self._ledger.sum("stale"),
            "refused_priorities": self._ledger.sum("refused"),
            "lost_updates": self._replies.lost_updates,
            "shards_living": sum(self._ledger.living),
            "shards_lost": self._ledger.losses,
        }

    # --- saving -----------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Let all shards take a checkpoint now.

        Raises:
            CheckpointError: there is no `checkpoint_dir`.
            ShardError: a shard is lost.
        """
        self._updates.send()
        self._get([shard.checkpoint.remote() for shard in self._shards])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the state of all shards and of this object to a folder.

        Until everything is written, the folder holds the previous save.

        Args:
            folder: folder that this process and all shards can reach.

        Raises:
            ConfigurationError: `folder` is not a path.
            ShardError: a shard is lost.
            OSError: something cannot be written.
        """
        folder = saving.as_path("folder", folder)
        token = uuid.uuid4().hex[:12]  # the files of one save share it
        folder.mkdir(parents=True, exist_ok=True)
        files = [saving.file_of(folder, k, token) for k in range(self.num_shards)]
        pairs = zip(self._shards, files, strict=True)
        self._updates.send()
        self._get([shard.save.remote(file) for shard, file in pairs])
        settings = {key: value for key, value in self._settings.items() if key != "device"}
        state = {
            "num_shards": self.num_shards,
            "batch_size": self.batch_size,
            "settings": settings | self._live(),
            "beta": self.beta,
            "beta_schedule": None if self.beta_schedule is None else asdict(self.beta_schedule),
            "updates": int(self._rules.state_dict()["updates"]),
            "beta_increment": self.beta_increment,
            "generator": None if self.generator is None else self.generator.get_state(),
        }
        saving.write(folder, state, token)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], **options: Any) -> "ShardedReplayBuffer":
        """Make a buffer with the settings and the state that `save` wrote.

        Args:
            folder: folder of the save.
            options: arguments of the constructor that are not part of the state, such as devices,
                `checkpoint_dir` and timeouts. A `generator` takes over the saved state.

        Raises:
            CheckpointError: the folder holds no such state.
            ConfigurationError: an option is not accepted.
            FileNotFoundError: there is no such folder.
        """
        folder = saving.as_path("folder", folder)
        state, settings = saving.read(folder)
        for name in settings.keys() & options.keys():
            raise ConfigurationError(f"{name}: expected the one saved, got {options[name]!r} too")
        buffer = cls(**settings, **options)
        buffer._restore(folder, state)
        return buffer

    def _restore(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over the state of a save in `folder`; where it fails, end the shards."""
        with self._ending_on_error():
            beta = torch.tensor(state["beta"], dtype=torch.float64, device="cpu")
            counted = {"updates": state.get("updates", 0), "beta": beta}
            self._rules.load_state_dict(self._rules.state_dict() | counted)
            if self.generator is not None and state["generator"] is not None:
                saving.restore(self.generator, state["generator"])
            files = [saving.file_of(folder, k, state["token"]) for k in range(self.num_shards)]
            pairs = zip(self._shards, files, strict=True)
            self._take_up([shard.load.remote(file) for shard, file in pairs])
