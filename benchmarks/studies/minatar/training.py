"""The training loop: S runs of one agent on one game, in lockstep."""

import copy
import time
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from minatar import Environment
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor

from benchmarks.studies.minatar.networks import Networks
from benchmarks.studies.minatar.settings import Arm, Settings
from per_td import NStepWriter, PrioritizedReplayBuffer


@dataclass(frozen=True)
class Outcome:
    """S runs.

    Attributes:
        ends: int32 [S, most episodes]: frame at which each episode ended; 0 after the last.
        returns: float32 [S, most episodes].
        diagnostics: by key, float32 [S, times].
        seconds: of all.
    """

    ends: NDArray
    returns: NDArray
    diagnostics: dict[str, NDArray]
    seconds: float


class Games:
    """S games of MinAtar, each with seeds of its own."""

    def __init__(self, game: str, runs: int, sticky: float, seed: int) -> None:
        self.games = [Environment(game, sticky_action_prob=sticky) for _ in range(runs)]
        for run, one in enumerate(self.games):
            one.seed((seed + run) % 2**31)
            one.reset()
        self.actions = [one.minimal_action_set() for one in self.games]
        height, width, self.channels = self.games[0].state_shape()
        self.image = torch.empty(runs, self.channels, height, width, dtype=torch.bool)
        self.look()

    def look(self) -> Tensor:
        """Images, bool [S, channels, 10, 10]."""
        image = torch.empty_like(self.image)
        for run, one in enumerate(self.games):
            image[run] = torch.from_numpy(one.state()).permute(2, 0, 1)
        self.image = image
        return image

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Take a step of each game: rewards float32 [S], and bool [S] where it ended."""
        found = [
            one.act(which[a])
            for one, which, a in zip(self.games, self.actions, action.tolist(), strict=True)
        ]
        reward, ended = zip(*found, strict=True)
        return torch.tensor(reward, dtype=torch.float32), torch.tensor(ended)

    def reset(self, ended: Tensor) -> None:
        """Reset the games that ended."""
        for run in ended.nonzero().flatten().tolist():
            self.games[run].reset()


class Learners:
    """S networks, their targets, and one optimizer."""

    def __init__(self, networks: Networks, arm: Arm) -> None:
        self.online, self.target = networks, copy.deepcopy(networks)
        self.optimizer = torch.optim.Adam(networks.parameters(), arm.lr, eps=3.125e-4, fused=True)

    @torch.no_grad()
    def act(self, image: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
        """Epsilon-greedy actions, int64 [S]."""
        value = self.online(image.unsqueeze(1)).squeeze(1)
        random = torch.randint(value.shape[1], value.shape[:1], generator=generator)
        explores = torch.rand(len(value), generator=generator) < epsilon
        return torch.where(explores, random, value.argmax(-1))

    def learn(self, batch: TensorDict) -> Tensor:
        """One gradient step of every run; TD errors [S, B]."""
        with torch.no_grad():
            following = self.target(batch["next", "observation"]).amax(-1)
            wanted = batch["next", "reward"] + batch["discount"] * following
        action = batch["action"].unsqueeze(-1)
        value = self.online(batch["observation"]).gather(-1, action).squeeze(-1)
        loss = torch.nn.functional.smooth_l1_loss(value, wanted, reduction="none")
        self.optimizer.zero_grad()
        (batch["priority_weight"] * loss).mean(-1).sum().backward()
        self.optimizer.step()
        return (wanted - value).detach()


def make_buffer(
    settings: Settings, arm: Arm, runs: int, generator: torch.Generator
) -> PrioritizedReplayBuffer:
    """One buffer per run, in one object."""
    return PrioritizedReplayBuffer(
        settings.capacity,
        settings.batch_size,
        num_buffers=runs,
        generator=generator,
        track_draws=True,  # for the share that was never replayed
        **arm.replay,
    )


def train(settings: Settings, arm: Arm, game: str, *, runs: int, seed: int, name: str) -> Outcome:
    """Train S independent runs; `name` and `seed` seed everything."""
    start, seed = time.perf_counter(), zlib.crc32(f"{game}/{name}/{seed}".encode())
    generator = torch.Generator().manual_seed(seed)
    games = Games(game, runs, settings.sticky, seed)
    networks = Networks(runs, games.channels, len(games.actions[0]), generator)
    learners = Learners(networks, arm)
    buffer = make_buffer(settings, arm, runs, generator)
    writer = NStepWriter(buffer, arm.n_step, settings.gamma, num_envs=runs)
    episodes: list[list[tuple[int, float]]] = [[] for _ in range(runs)]
    returns, lines = torch.zeros(runs), []
    image = games.image
    for frame in range(1, settings.frames + 1):
        share = max(settings.explore_end, 1 - frame / settings.explore_frames)
        action = learners.act(image, share, generator)
        reward, ended = games.step(action)
        after: dict[str, Any] = {"observation": games.look(), "reward": reward}
        step: dict[str, Any] = {"observation": image, "action": action, "next": after}
        if arm.n_step == 1:  # the same as by the writer, in less time
            discount = torch.where(ended, 0.0, settings.gamma)
            buffer.add(TensorDict(step | {"discount": discount}, [runs]))
        else:
            after |= {"terminated": ended, "truncated": torch.zeros_like(ended)}
            writer.add(step)
        returns += reward
        if ended.any():
            for run in ended.nonzero().flatten().tolist():
                episodes[run].append((frame, float(returns[run])))
            returns[ended] = 0
            games.reset(ended)
            games.look()
        image = games.image
        if frame >= settings.learning_starts and frame % settings.update_every == 0:
            batch = buffer.sample()
            td_error = learners.learn(batch)
            buffer.update_priority(batch["index"], td_error, batch["generation"])
        if frame % settings.copy_every == 0:
            learners.target.load_state_dict(learners.online.state_dict())
        if frame % settings.diagnose_every == 0:
            found = buffer.diagnostics()
            lines.append({key: value.float().expand(runs) for key, value in found.items()})
    return _outcome(episodes, lines, time.perf_counter() - start)


def _outcome(
    episodes: list[list[tuple[int, float]]], lines: list[dict[str, Tensor]], seconds: float
) -> Outcome:
    most = max(1, *map(len, episodes))
    ends = np.zeros((len(episodes), most), np.int32)
    returns = np.zeros((len(episodes), most), np.float32)
    for run, found in enumerate(episodes):
        for place, (end, value) in enumerate(found):
            ends[run, place], returns[run, place] = end, value
    diagnostics = {
        key: torch.stack([line[key] for line in lines], 1).numpy() for key in (lines or [{}])[0]
    }
    return Outcome(ends, returns, diagnostics, seconds)
