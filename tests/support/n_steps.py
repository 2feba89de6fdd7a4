"""Random steps of many environments, and n-step transitions of them by plain lists."""

import torch
from tensordict import TensorDict

from per_td import NStepWriter


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


class Written:
    """A buffer that keeps what it is given."""

    def __init__(self) -> None:
        self.got, self.priorities = [], []

    def extend(self, td, priority=None):
        self.got.append(td)
        if priority is not None:
            self.priorities += priority.tolist()
        return len(self.got) - 1

    @property
    def rows(self) -> TensorDict:
        return torch.cat(self.got)


def steps(
    *size: int,
    generator: torch.Generator,
    ends: float = 0.15,
    exact: bool = False,
    dtype: torch.dtype = torch.float32,
    last: bool = True,
) -> TensorDict:
    """Trajectories [*size], time last: numbered observations, rewards and ends at random.

    Args:
        ends: probability of each kind of end.
        exact: rewards are small multiples of 1/8, so that float32 sums them without rounding.
        last: the last steps may also be ends.
    """
    count = torch.Size(size).numel()
    number = torch.arange(count, dtype=torch.float32).view(*size, 1)
    reward = torch.randn(*size, 1, generator=generator, dtype=torch.float64)
    if exact:
        reward = (reward * 8).round() / 8
    terminated, truncated = (torch.rand(2, *size, 1, generator=generator) < ends).unbind()
    if not last:
        terminated[..., -1, :], truncated[..., -1, :] = False, False
    return TensorDict(
        {
            "observation": number.repeat_interleave(2, -1),
            "action": torch.randint(4, size, generator=generator),
            "next": {
                "observation": number.repeat_interleave(2, -1) + 0.5,
                "reward": reward.to(dtype),
                "terminated": terminated,
                "truncated": truncated,
                "done": terminated | truncated,
            },
        },
        batch_size=size,
    )


class Plain:
    """`NStepWriter` by lists of each environment, step by step; the twin of the fast one."""

    def __init__(self, n: int, gamma: float, num_envs: int, autoreset: str = "same_step") -> None:
        self.n, self.gamma, self.autoreset = n, gamma, autoreset
        self.pending = [[] for _ in range(num_envs)]
        self.over = [False] * num_envs
        self.written: list[dict] = []

    def add(self, td, env, priority=None) -> None:
        for row, e in enumerate(env):
            if self.over[e]:
                self.over[e] = False
                continue
            after, queue = td[row]["next"], self.pending[e]
            first = None if priority is None else float(priority[row])
            queue.append({"td": td[row].clone(), "priority": first})
            ended = bool(after["terminated"]) or bool(after["truncated"])
            while queue and (ended or len(queue) == self.n):
                self.write(queue, terminated=bool(after["terminated"]))
            self.over[e] = ended and self.autoreset == "next_step"

    def flush(self, env) -> None:
        for e in env:
            while self.pending[e]:
                self.write(self.pending[e], terminated=False, cut=True)

    def write(self, queue, *, terminated: bool, cut: bool = False) -> None:
        rewards = [float(step["td"]["next", "reward"]) for step in queue]
        first, last, m = queue[0]["td"], queue[-1]["td"], len(queue)
        self.written.append(
            {
                "observation": first["observation"].tolist(),
                "action": int(first["action"]),
                "next": last["next", "observation"].tolist(),
                "reward": sum(self.gamma**k * reward for k, reward in enumerate(rewards)),
                "terminated": terminated,
                "truncated": cut or bool(last["next", "truncated"]),
                "discount": 0.0 if terminated else self.gamma**m,
                "steps": m,
                "priority": queue[0]["priority"],
            }
        )
        del queue[0]


def collected(trajectories: TensorDict, n: int, gamma: float, *, flush: bool = True) -> TensorDict:
    """What a writer writes of trajectories [E, T], by environment, each in the order of time."""
    target = Written()
    writer = NStepWriter(target, n, gamma, num_envs=len(trajectories))
    for td in trajectories.unbind(1):
        writer.add(td)
    if flush:
        writer.flush()
    rows = target.rows
    return rows[rows["observation"][:, 0].argsort(stable=True)]
