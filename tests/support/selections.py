"""The obvious twin of selections, in float64: probabilities and weights of every slot."""

import itertools

import torch
from tensordict import TensorDict
from torch import Tensor

from per_td import PrioritizedReplayBuffer

WINDOWS = (None, 1, 9, 33, 10_000)
LATEST = (0, 7)
MIXES = (0.0, 0.3, 1.0)
KNOBS = [
    {"by": by, "newest": newest, "latest": latest, "uniform_mix": mix}
    for by, newest, latest, mix in itertools.product(
        ("priority", "uniform", "inverse"), WINDOWS, LATEST, MIXES
    )
    if by == "priority" or not mix  # the mixture is one of priorities
]
"""All knobs of draws, each with each."""


def ages(written: Tensor, capacity: int) -> Tensor:
    """Ages of the transitions in the slots, int64 [S, capacity]; -1 of empty slots."""
    age = torch.full((len(written), capacity), -1)
    for s, count in enumerate(written.tolist()):
        for k in range(max(0, count - capacity), count):
            age[s, k % capacity] = count - 1 - k
    return age


def probabilities(
    mass: Tensor,
    age: Tensor,
    n: int,
    *,
    by: str,
    newest: int | None,
    latest: int,
    uniform_mix: float,
) -> Tensor:
    """P of each slot, float64 [S, N], for masses [S, N] and batches of n."""
    mass = mass.double()
    can = (mass > 0) & ((age < newest) if newest else True)
    one = can.double()
    own = {"priority": mass, "uniform": one, "inverse": 1 / mass}[by]
    own = torch.where(can, own, 0.0)
    p = own / own.sum(-1, keepdim=True)
    if by == "priority":
        p = (1 - uniform_mix) * p + uniform_mix * one / one.sum(-1, keepdim=True)
    forced = (mass > 0) & (age >= 0) & (age < latest)
    return ((n - forced.sum(-1, keepdim=True)) * p + forced) / n


def weights(p: Tensor, index: Tensor, beta: float, normalization: str, size: Tensor) -> Tensor:
    """w = (N P)^-beta of slots [S, B] over the largest, float64; N is `size` [S, 1]."""
    w = (size * p).pow(-beta)  # inf where nothing is drawn
    drawn = w.gather(1, index)
    if normalization == "batch":
        return drawn / drawn.amax(-1, keepdim=True)
    if normalization == "buffer":
        return drawn / torch.where(w.isfinite(), w, 0.0).amax(-1, keepdim=True)
    return drawn


def filled(
    capacity: int,
    groups: int | None,
    device: torch.device,
    *,
    wrap: int = 21,
    seed: int = 0,
    **given,
) -> PrioritizedReplayBuffer:
    """A buffer that has gone round, with priorities of all sizes, and some of 0, also new ones."""
    given = {"beta": 0.6, "generator": torch.Generator(device).manual_seed(seed), **given}
    buffer = PrioritizedReplayBuffer(capacity, num_buffers=groups, device=device, **given)
    random = torch.Generator().manual_seed(seed + 1)
    n, rows = capacity + wrap, groups or 1
    priority = torch.rand(rows, n, generator=random).pow(3) * 4 + 0.01
    priority[torch.rand(rows, n, generator=random) < 0.2] = 0.0
    priority[:, -3] = 0.0  # one of the newest
    priority[:, -2] = 0.005  # the smallest of all is new
    k = torch.arange(n, device=device).expand(rows, n)
    transitions = TensorDict({"k": k}, [rows, n])
    for part in (slice(0, capacity // 2), slice(capacity // 2, n)):
        given = transitions[:, part], priority[:, part].to(device)
        buffer.extend(*(given if groups else (each[0] for each in given)))
    return buffer


def rows_of(values: Tensor) -> Tensor:
    """Values [n] or [S, n] as [S, n], on the CPU."""
    return values.detach().cpu().reshape(-1, values.shape[-1])
