"""NStepWriter: n-step transitions of many environments, written to a buffer when finished."""

import copy
import inspect
import json
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from per_td import validation
from per_td.checkpoint import file as checkpoint
from per_td.copies import Copied
from per_td.errors import CheckpointError, ConfigurationError, IndexRangeError, SchemaError
from per_td.kernels import reference
from per_td.memory import allocating, zeros
from per_td.storage.layouts import Field
from per_td.storage.leaves import Key, Leaves, flattened, named, nested, require_keys
from per_td.storage.ring import as_mask
from per_td.storage.schema import Schema
from per_td.storage.structure import Structure

__all__ = ["NStepWriter"]

AUTORESETS = ("same_step", "next_step")

_FORMAT = "per_td.NStepWriter"
_VERSION = 1
_REWARDS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TENSORS = ("returns", "priority", "taken", "count", "over")
_STATE_KEYS = {"format", "version", "settings", "pending"}
_FLAGS = ("terminated", "truncated", "done")

_KEYS: dict[str, Any] = {
    "next": "next",
    "reward": ("next", "reward"),
    "terminated": ("next", "terminated"),
    "truncated": ("next", "truncated"),
    "done": ("next", "done"),
    "discount": "discount",
    "steps": "steps",
}
"""Names of the `keys` argument, and TorchRL's keys."""


def _keys(keys: Any) -> dict[str, Key]:
    """TorchRL's keys, and in their place those that are given."""
    if not isinstance(keys, dict) or (unknown := set(keys) - set(_KEYS)):
        got = sorted(map(str, unknown)) if isinstance(keys, dict) else type(keys).__name__
        raise ConfigurationError(f"keys: expected a dict with any of {[*_KEYS]}, got {got}")
    given: dict[str, Key] = {}
    for name, usual in _KEYS.items():
        value = keys.get(name, usual)
        key = (value,) if isinstance(value, str) else value
        if not (isinstance(key, tuple) and key and all(isinstance(part, str) for part in key)):
            raise ConfigurationError(
                f"keys, {name!r}: expected a name or a tuple of names, got {value!r}"
            )
        given[name] = key
    if given["discount"] == given["steps"]:
        raise ConfigurationError(
            f"keys: expected different ones for discount and steps, got {given['steps']} twice"
        )
    return given


@dataclass(frozen=True)
class _Pending(Copied):
    """All that a writer remembers; replaced as a whole, so that no call does half its work.

    Step number t of environment e (counting from 0, for ever) lies in row `e * n + t % n` of
    `first`. At most n - 1 are pending between calls, so that the row of the next is free. Of `last`
    two steps of an environment are kept, step t in row `e * 2 + t % 2`.
    """

    schema: Schema  # entries of a step
    prioritized: bool  # True if steps bring initial priorities
    first: Leaves  # entries that a transition takes from its first step, [E * n, ...]
    last: Leaves  # entries under "next", which it takes from its last step, [E * 2, ...]
    returns: Tensor  # sums of discounted rewards so far, float64 [E, n]
    priority: Tensor  # initial priorities, float32 [E * n]
    taken: Tensor  # number of steps ever taken, int64 [E]
    count: Tensor  # number of steps that are pending, int64 [E]
    over: Tensor  # True where the next row is that of a reset, bool [E]

    def on(self, device: torch.device) -> "_Pending":
        """These steps on `device`."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        for name in ("first", "last"):
            moved[name] = {key: leaf.to(device) for key, leaf in getattr(self, name).items()}
        return replace(self, **moved)


def _write(column: Tensor, row: Tensor, leaf: Tensor) -> None:
    """Write the rows of `leaf` [B, ...] to `row` [B] of a column."""
    reference.indexable(column).index_copy_(0, row, reference.indexable(leaf))


class NStepWriter:
    """Sums up n steps of each environment, and writes finished transitions to a buffer.

    It makes the n-step return of Sutton and Barto 2018 (section 7.1), as Rainbow uses it (Hessel et
    al. 2017, arXiv 1710.02298, "Multi-step learning"). A transition that begins at step t has

        reward = r_t + gamma r_{t+1} + ... + gamma^{m-1} r_{t+m-1},    next = next_{t+m-1},

    where m is n, or smaller if the episode ends before. Its target is reward + discount Q(next).
    The discount is gamma^m, or 0 if the episode terminated; truncated episodes keep gamma^m. When
    an episode ends, all its pending steps are written.

    A written transition has the entries of its first step. Its entries under "next", terminated,
    truncated and done are those of its last step, and its reward is the sum above, computed in
    float64. Two entries are added in the shape of the reward: "discount", in the dtype of the
    reward, and "steps", which is m, int64. Finished transitions are written environment by
    environment, in the order of the rows, the oldest first.

    The pending steps take [num_envs, n, ...] on the device of the rewards, however long episodes
    are. On CUDA the host waits in each `add` to find out which transitions are finished. The
    exception: if the buffer has `num_buffers` and `env` is None, the buffer gets a mask, and the
    host does not wait.

    Use a writer in one thread. If you send a writer to a process, that process gets a copy of the
    pending steps.

    Args:
        buffer: object with `extend(td)` or `extend(td, priority)`: a `PrioritizedReplayBuffer`, a
            writer of per_td.ray, a buffer of TorchRL. If it has `num_buffers`, that must be
            `num_envs`, and the transitions of environment e go to buffer e.
        n: number of steps, at least 1.
        gamma: discount factor, in [0, 1].
        num_envs: number of environments E.
        autoreset: meaning of the row after an episode's end. "same_step": the first step of the
            next episode (Gymnasium's SAME_STEP, TorchRL, and environments that you reset yourself).
            The entries under "next" must then be the true last ones, which Gymnasium has in
            `info["final_obs"]`. "next_step": only the reset, which is no transition and is left out
            (Gymnasium's NEXT_STEP, its default).
        keys: keys that differ from TorchRL's, by name. Names of entries that you bring: "next",
            "reward", "terminated", "truncated", "done". Names of entries that are added: "discount"
            and "steps". With {"steps": "steps_to_next_obs"}, TorchRL's losses use it.

    Raises:
        ConfigurationError: an argument is not accepted.

    Example:
        >>> from per_td import PrioritizedReplayBuffer
        >>> buffer = PrioritizedReplayBuffer(100)
        >>> writer = NStepWriter(buffer, n=3, gamma=0.5)
        >>> flag = torch.zeros(1, dtype=torch.bool)
        >>> for k in range(4):
        ...     after = {"observation": torch.tensor([[k + 1.0]]), "reward": torch.ones(1)}
        ...     after |= {"terminated": flag | (k == 3), "truncated": flag}
        ...     index = writer.add({"observation": torch.tensor([[float(k)]]), "next": after})
        >>> buffer.transitions["next", "reward"]
        tensor([1.7500, 1.7500, 1.5000, 1.0000])
        >>> buffer.transitions["discount"], buffer.transitions["steps"]
        (tensor([0.1250, 0.0000, 0.0000, 0.0000]), tensor([3, 3, 2, 1]))
    """

    def __init__(
        self,
        buffer: Any,
        n: int,
        gamma: float,
        num_envs: int = 1,
        *,
        autoreset: str = "same_step",
        keys: dict[str, Any] | None = None,
    ) -> None:
        if not callable(getattr(buffer, "extend", None)):
            raise ConfigurationError(
                f"buffer: expected something with extend(td), got {type(buffer).__name__}"
            )
        self._buffer = buffer
        self._n = validation.positive_int("n", n)
        self._gamma = validation.real("gamma", gamma, high=1.0)
        self._num_envs = validation.positive_int("num_envs", num_envs)
        self._autoreset = validation.one_of("autoreset", autoreset, AUTORESETS)
        self._keys = _keys({} if keys is None else keys)
        buffers = getattr(buffer, "num_buffers", None)
        if buffers is not None and buffers != self._num_envs:
            raise ConfigurationError(
                f"num_envs: expected {buffers}, one for each buffer, got {num_envs}"
            )
        self._many = buffers is not None
        self._framed = getattr(buffer, "frames", None) is not None
        if self._framed and self._num_envs > buffer.num_envs:
            raise ConfigurationError(
                f"num_envs: expected at most {buffer.num_envs}, whose frames the buffer keeps, got"
                f" {num_envs}"
            )
        self._pending: _Pending | None = None
        self._cached: tuple[Tensor, Tensor, Tensor] | None = None

    n: int = validation.fixed("n", lambda self: self._n)
    """Number of steps."""

    gamma: float = validation.fixed("gamma", lambda self: self._gamma)
    """Discount factor."""

    num_envs: int = validation.fixed("num_envs", lambda self: self._num_envs)
    """Number of environments."""

    autoreset: str = validation.fixed("autoreset", lambda self: self._autoreset)
    """Meaning of the row after an episode's end."""

    def __repr__(self) -> str:
        return (
            f"NStepWriter(n={self.n}, gamma={self.gamma:g}, num_envs={self.num_envs},"
            f" autoreset={self.autoreset!r}, buffer={self._buffer!r})"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": None}

    @property
    def pending(self) -> Tensor:
        """Number of steps of each environment that are not yet written, int64 [num_envs]."""
        if self._pending is None:
            return torch.zeros(self.num_envs, dtype=torch.int64, device="cpu")
        return self._pending.count

    def empty(self) -> None:
        """Forget the pending steps without writing them, and the keys; the buffer stays."""
        self._pending = None

    # --- writing ----------------------------------------------------------------------------------

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, td: Any, env: Any = None, *, priority: Any = None, mask: Any = None) -> Any:
        """Take one step of each environment, and write the transitions that it finishes.

        Args:
            td: TensorDict [B], or a dict of tensors [B, ...]. It has the reward, floating-point [B]
                or [B, 1]; terminated, bool [B] or [B, 1]; and truncated or done or both, bool.
            env: environment of each row, integers [B], all different. None: the rows are all
                environments in order, B = num_envs.
            priority: initial priorities of the steps, finite and not negative, [B]. A transition
                gets that of its first step. None leaves it to the buffer. Either all calls bring
                priorities, or none. To give priorities to finished transitions, hand the writer an
                object whose `extend(td)` computes them.
            mask: bool [B]. Rows where it is False are skipped, also if their priority is not valid.
                On CUDA the host does not wait for `mask`, but it waits for `env`.

        Returns:
            Result of `buffer.extend`, such as slots. None if no transition was finished; but if the
            buffer has `num_buffers`, slots [num_envs, n], -1 where none was.

        Raises:
            SchemaError: a key is missing, or keys, shapes, dtypes or the number of rows are wrong.
            IndexRangeError: `env` is wrong.
            PriorityError: `priority` is wrong.
            ConfigurationError: only some calls bring priorities, or the buffer takes none.
            Exception: raised by `buffer.extend`. After any error, nothing has been written or
                remembered: you can add the same step again.
        """
        schema = Schema() if self._pending is None else self._pending.schema
        leaves, rows = schema.check(td)
        if self._pending is None:
            self._check_keys(leaves)
        device = leaves[self._keys["reward"]].device
        leaves = {key: validation.plain_rows(leaf.detach(), device) for key, leaf in leaves.items()}
        at = self._rows_of(env, rows, device)
        part = None if mask is None else as_mask(mask, (rows,), device)
        given = self._check_priority(priority, rows, device, part)
        if not rows:
            return None
        if self._pending is None:
            pending = self._allocated(device, leaves, schema, prioritized=given is not None)
        elif self._pending.count.device != device:
            pending = self._pending.on(device)
        else:
            pending = self._pending
        if self._many and env is not None:
            leaves, part, given, at = self._spread(leaves, part, given, at)
        taking = ~pending.over[at]
        if part is not None:
            taking &= part
        taken, count = pending.taken[at], pending.count[at]
        # the row of a step that takes no part is free, and stays so
        row, last_row = at * self.n + taken % self.n, at * 2 + taken % 2
        for key, column in pending.first.items():
            _write(column, row, leaves[key])
        for key, column in pending.last.items():
            _write(column, last_row, leaves[key])
        if given is not None:
            _write(pending.priority, row, given)
        age, weight, _ = self._constants(device)
        slots = (taken.unsqueeze(-1) - age) % self.n
        live = age <= count.unsqueeze(-1)
        before = pending.returns[at]
        returns = before.gather(1, slots).where(live & (age > 0), 0.0)
        returns += weight * leaves[self._keys["reward"]].reshape(-1, 1)
        ended = self._ended(leaves)
        finished = live & (ended.unsqueeze(-1) | (age == self.n - 1)) & taking.unsqueeze(-1)
        result = self._extend(pending, leaves, at, slots, returns, finished)
        returns = before.scatter(1, slots, returns).where(taking.unsqueeze(-1), before)
        over = pending.over
        if self.autoreset == "next_step":
            ended &= taking
            over = over.index_copy(0, at, ended if part is None else ended.where(part, over[at]))
        count = (count + 1).clamp_(max=self.n - 1).masked_fill_(ended, 0).where(taking, count)
        self._pending = replace(
            pending,
            returns=pending.returns.index_copy(0, at, returns),
            taken=pending.taken.index_copy(0, at, taken + taking),
            count=pending.count.index_copy(0, at, count),
            over=over,
        )
        return result

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self, env: Any = None) -> Any:
        """Write all pending steps now, as if their episodes had been truncated.

        Use it at the end of a collection, or when you leave an episode before its end. The
        transitions have fewer steps, the discount of these steps, and True at `truncated` and
        `done`.

        Args:
            env: environments to write, integers [B], all different; None: all.

        Returns:
            Result of `buffer.extend`, such as slots. None if no step was pending; but if the buffer
            has `num_buffers`, slots [num_envs, n], -1 where none was.

        Raises:
            IndexRangeError: `env` is wrong.
            Exception: raised by `buffer.extend`; the steps are still pending.
        """
        pending = self._pending
        device = torch.device("cpu") if pending is None else pending.count.device
        chosen = torch.ones(self.num_envs, dtype=torch.bool, device=device)
        if env is not None:
            chosen.zero_()[self._rows_of(env, None, device)] = True
        if pending is None:
            return None
        at = torch.arange(self.num_envs, device=device)
        age, _, _ = self._constants(device)
        newest = pending.taken - 1
        slots = (newest.unsqueeze(-1) - age) % self.n
        leaves = {
            key: reference.select(column, at * 2 + newest % 2)
            for key, column in pending.last.items()
        }
        for name in _FLAGS:
            if (field := pending.schema.fields.get(self._keys[name])) is not None:
                shape = (self.num_envs, *field.shape)
                leaves[field.key] = torch.full(
                    shape, name != "terminated", dtype=torch.bool, device=device
                )
        finished = (age < pending.count.unsqueeze(-1)) & chosen.unsqueeze(-1)
        returns = pending.returns.gather(1, slots)
        result = self._extend(pending, leaves, at, slots, returns, finished)
        self._pending = replace(pending, count=pending.count.masked_fill(chosen, 0))
        return result

    def _extend(
        self,
        pending: _Pending,
        leaves: Leaves,
        at: Tensor,
        slots: Tensor,
        returns: Tensor,
        finished: Tensor,
    ) -> Any:
        """Write finished transitions; the pending steps include the last one.

        `leaves` [B, ...] are the entries of the last step of each row, `at` [B] its environment,
        `slots` [B, n] the places of its last n steps in `pending`, oldest first, `returns` [B, n]
        the sums of discounted rewards from each of them, `finished` [B, n] True for those to write.
        """
        device, keys, schema = finished.device, self._keys, pending.schema
        if self._many:
            size = finished.shape
            b = torch.arange(size[0], device=device).repeat_interleave(self.n)
            k = torch.arange(self.n, device=device).repeat(size[0])
        else:
            b, k = finished.nonzero().unbind(1)
            size = b.shape
            if not len(b):
                return None
        age, _, discount = self._constants(device)
        row = at[b] * self.n + slots[b, k]
        terminated = leaves[keys["terminated"]].reshape(-1)
        reward = schema.fields[keys["reward"]]
        out: Leaves = {}
        for key in schema.fields:
            if key == reward.key:
                out[key] = returns[b, k].to(reward.dtype)
            elif key in pending.first:
                out[key] = reference.select(pending.first[key], row)
            else:
                out[key] = reference.select(leaves[key], b)
        out[keys["discount"]] = discount[k].masked_fill(terminated[b], 0.0).to(reward.dtype)
        out[keys["steps"]] = age[k] + 1
        for key in (reward.key, keys["discount"], keys["steps"]):
            out[key] = out[key].view(-1, *reward.shape)
        shaped = ((key, leaf.view(*size, *leaf.shape[1:])) for key, leaf in out.items())
        td = schema.structure.assembled(shaped, {}, size, device)
        priority = (pending.priority[row].view(size),) if pending.prioritized else ()
        if self._many:
            return self._buffer.extend(td, *priority, mask=finished)
        if self._framed:
            return self._buffer.extend(td, *priority, env=at[b])
        return self._buffer.extend(td, *priority)

    def _ended(self, leaves: Leaves) -> Tensor:
        """Flags of the rows whose episode ends, bool [B]."""
        ended = leaves[self._keys["terminated"]].flatten().clone()
        for name in ("truncated", "done"):
            if (flag := leaves.get(self._keys[name])) is not None:
                ended |= flag.flatten()
        return ended

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """For the last n steps, oldest first, [n]: steps after it, a reward's weight, discount."""
        if self._cached is None or self._cached[0].device != device:
            ages = range(self.n - 1, -1, -1)
            powers = [self.gamma**age for age in (*ages, self.n)]
            real = torch.tensor(powers, dtype=torch.float64, device=device)
            age = torch.tensor(ages, dtype=torch.int64, device=device)
            self._cached = age, real[:-1], real[[-1, *range(self.n - 1)]]
        return self._cached

    # --- checks -----------------------------------------------------------------------------------

    def _check_keys(self, leaves: Leaves) -> None:
        """Refuse a first step without the keys that it needs, or with those that are written."""
        keys = self._keys
        for needed in (("reward",), ("terminated",), ("truncated", "done")):
            if not any(keys[name] in leaves for name in needed):
                raise self._missing(" or ".join(named(keys[name]) for name in needed), leaves)
        if not any(self._is_last(key) for key in leaves):
            raise self._missing(f"an entry at {named(keys['next'])}", leaves)
        for name in ("reward", *_FLAGS):
            if (leaf := leaves.get(keys[name])) is None:
                continue
            right = leaf.dtype in (_REWARDS if name == "reward" else (torch.bool,))
            if not right or leaf.shape[1:] not in ((), (1,)):
                real = "floating-point numbers of 16 to 64 bits"
                kind = real if name == "reward" else "torch.bool"
                raise SchemaError(
                    f"{named(keys[name])}: expected {kind} of shape [B] or [B, 1], got"
                    f" {leaf.dtype} of shape {[*leaf.shape]}"
                )
        for name in ("discount", "steps"):
            if keys[name] in leaves:
                raise SchemaError(
                    f"{named(keys[name])}: expected no such entry, which the writer adds, got one:"
                    f" keys={{{name!r}: ...}} names another"
                )
        added = dict.fromkeys((keys["discount"], keys["steps"]), leaves[keys["reward"]])
        require_keys(leaves | added)

    def _missing(self, what: str, leaves: Leaves) -> SchemaError:
        return SchemaError(
            f"expected {what} in a step, got the keys {', '.join(map(named, leaves))}: the"
            " argument keys tells the writer other names"
        )

    def _is_last(self, key: Key) -> bool:
        """True for an entry under "next" that is neither reward nor flag."""
        after = self._keys["next"]
        return key[: len(after)] == after and not self._is_known(key)

    def _is_known(self, key: Key) -> bool:
        return any(key == self._keys[name] for name in ("reward", *_FLAGS))

    def _rows_of(self, env: Any, rows: int | None, device: torch.device) -> Tensor:
        """The environment of each row, int64 [B] on `device`; the host looks at what is given."""
        if env is None:
            if rows != self.num_envs:
                raise SchemaError(
                    f"expected {self.num_envs} rows, one for each environment, got {rows}: env="
                    " tells which environments they are"
                )
            return torch.arange(rows, device=device)
        at = validation.as_index(env, torch.device("cpu"), "env")
        if rows is not None and len(at) != rows:
            raise IndexRangeError(f"env: expected {rows} numbers, one for each row, got {len(at)}")
        wrong = at[(at < 0) | (at >= self.num_envs)].tolist()
        if wrong:
            raise IndexRangeError(f"env: expected 0 <= env < {self.num_envs}, got {wrong[0]}")
        twice = (at.bincount() > 1).nonzero()
        if len(twice):
            raise IndexRangeError(f"env: expected each environment once, got {int(twice[0])} again")
        return validation.to_device(at, device)

    def _check_priority(
        self, priority: Any, rows: int, device: torch.device, part: Tensor | None
    ) -> Tensor | None:
        """Initial priorities, float32 [B] on `device`, or None; 0 for rows that take no `part`."""
        before = None if self._pending is None else self._pending.prioritized
        if before not in (None, priority is not None):
            wanted, got = ("some", "none") if before else ("none", "some")
            raise ConfigurationError(
                f"priority: expected {wanted}, as in the calls before, got {got}: a transition gets"
                " that of its first step"
            )
        if priority is None:
            return None
        try:
            inspect.signature(self._buffer.extend).bind(None, None)
        except TypeError as error:
            raise ConfigurationError(
                f"priority: expected None, got some: {type(self._buffer).__name__}.extend takes"
                " none; TorchRL's buffers take them as an entry of the data"
            ) from error
        except ValueError:  # it has no signature
            pass
        index = torch.empty(rows, dtype=torch.int64, device=device)
        values = validation.as_values("priority", priority, index)
        validation.require_finite("priority", values, low=0.0, wanted=part)
        return values if part is None else values.where(part, 0.0)

    # --- pending steps ----------------------------------------------------------------------------

    def _allocated(
        self, device: torch.device, leaves: Leaves, schema: Schema, *, prioritized: bool
    ) -> _Pending:
        """Memory for pending steps like those in `leaves` [B, ...]; it fixes the schema."""
        fields = [Field(key, leaf.shape[1:], leaf.dtype) for key, leaf in leaves.items()]
        first = [f for f in fields if not (self._is_last(f.key) or self._is_known(f.key))]
        last = [f for f in fields if self._is_last(f.key)]
        envs, rows = self.num_envs, self.num_envs * self.n
        size = rows * sum(f.bytes for f in first) + 2 * envs * sum(f.bytes for f in last)
        what = f"pending steps of {envs} environments, n={self.n}"
        with allocating(what, size, "Take fewer environments, or a smaller n."):
            made = _Pending(
                schema,
                prioritized,
                {f.key: zeros((rows, *f.shape), f.dtype, device) for f in first},
                {f.key: zeros((2 * envs, *f.shape), f.dtype, device) for f in last},
                returns=torch.zeros(envs, self.n, dtype=torch.float64, device=device),
                priority=torch.zeros(rows, dtype=torch.float32, device=device),
                taken=torch.zeros(envs, dtype=torch.int64, device=device),
                count=torch.zeros(envs, dtype=torch.int64, device=device),
                over=torch.zeros(envs, dtype=torch.bool, device=device),
            )
        schema.fix(fields)
        return made

    def _spread(
        self, leaves: Leaves, part: Tensor | None, given: Tensor | None, at: Tensor
    ) -> tuple[Leaves, Tensor, Tensor | None, Tensor]:
        """Rows for all environments in order; those that have none take no part."""
        every = torch.arange(self.num_envs, device=at.device)
        row = torch.zeros_like(every).index_copy_(0, at, every[: len(at)])
        present = torch.zeros_like(every, dtype=torch.bool).index_fill_(0, at, True)
        if part is not None:
            present &= part[row]
        leaves = {key: reference.select(leaf, row) for key, leaf in leaves.items()}
        return leaves, present, None if given is None else given[row], every

    # --- states -----------------------------------------------------------------------------------

    @property
    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("n", "gamma", "num_envs", "autoreset")}
        return own | {"keys": json.dumps(self._keys)}

    def state_dict(self) -> dict[str, Any]:
        """Return the settings and the pending steps, which `torch.load(weights_only=True)` reads.

        Save it together with the buffer's state. With both you can resume as if nothing happened.
        """
        steps = None
        if self._pending is not None:
            kept = copy.deepcopy(self._pending)  # the tensors change with the next step
            fields = kept.schema.fields.values()
            like = (
                (f.key, torch.empty((0, *f.shape), dtype=f.dtype, device="cpu")) for f in fields
            )
            steps = {
                "like": nested(like),
                "structure": kept.schema.structure.state(),
                "first": nested(kept.first.items()),
                "last": nested(kept.last.items()),
                "prioritized": kept.prioritized,
                **{name: getattr(kept, name) for name in _TENSORS},
            }
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "settings": self._settings,
            "pending": steps,
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the pending steps of a writer with the same settings.

        Raises:
            CheckpointError: it is not from `state_dict`, or has other settings; nothing has
                changed.
        """
        checkpoint.require(_FORMAT, state)
        if state.keys() != _STATE_KEYS or state["version"] != _VERSION:
            raise CheckpointError(
                f"expected a state of version {_VERSION} with the keys {sorted(_STATE_KEYS)},"
                f" got version {state.get('version')!r} with {sorted(map(str, state))}"
            )
        if state["settings"] != self._settings:
            raise CheckpointError(
                f"expected the state of a writer with {self._settings}, got {state['settings']}"
            )
        try:
            self._pending = None if state["pending"] is None else self._checked(state["pending"])
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"pending: expected what a writer saved: {error}") from error

    def _checked(self, steps: Any) -> _Pending:
        """The pending steps of a state, copied; an error of Python's if they are something else."""
        schema, like = Schema(), flattened(steps["like"])
        self._check_keys(schema.check_leaves(like)[0])
        schema.structure = Structure.from_state(steps["structure"])
        device = steps["count"].device
        made = self._allocated(device, like, schema, prioritized=bool(steps["prioritized"]))
        _copy_into(made.first, flattened(steps["first"]))
        _copy_into(made.last, flattened(steps["last"]))
        small: Leaves = {(name,): getattr(made, name) for name in _TENSORS}
        _copy_into(small, {key: steps[key[0]] for key in small})
        most = made.taken.clamp(max=self.n - 1)
        if not ((made.count >= 0) & (made.count <= most)).all():
            raise ValueError(f"count: expected 0 to {self.n - 1} pending steps, got others")
        return made


def _copy_into(wanted: Leaves, got: Leaves) -> None:
    """Fill tensors from those of a state; ValueError if keys, shapes or dtypes differ."""
    if wanted.keys() != got.keys():
        raise ValueError(f"expected the keys {[*wanted]}, got {[*got]}")
    for key, leaf in wanted.items():
        if leaf.shape != got[key].shape or leaf.dtype != got[key].dtype:
            raise ValueError(
                f"{named(key)}: expected {leaf.dtype} of shape {[*leaf.shape]}, got"
                f" {got[key].dtype} of shape {[*got[key].shape]}"
            )
        leaf.copy_(got[key])
