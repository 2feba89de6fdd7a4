"""Settings of the study: games, agents, and how each agent draws from its buffer."""

from dataclasses import dataclass, field, replace
from typing import Any

GAMES = ("breakout", "asterix", "space_invaders")


@dataclass(frozen=True)
class Settings:
    """The DQN, after Obando-Ceron and Castro 2021 (arXiv 2011.14826) and Dopamine's settings.

    They train for millions of frames with exploration that decays over 250,000; here both are
    shorter.
    """

    frames: int = 200_000  # of each run
    capacity: int = 100_000
    batch_size: int = 32
    gamma: float = 0.99
    learning_starts: int = 1_000
    update_every: int = 4  # frames
    copy_every: int = 1_000  # frames, from the network to its target
    explore_end: float = 0.01
    explore_frames: int = 50_000  # in which exploration falls from 1
    sticky: float = 0.1  # probability that a game repeats the last action
    diagnose_every: int = 10_000  # frames between two lines of diagnostics


@dataclass(frozen=True)
class Arm:
    """An agent: its learning rate, and the arguments of its buffer."""

    lr: float = 2.5e-4
    replay: dict[str, Any] = field(default_factory=dict)
    n_step: int = 1


_UNIFORM = {"alpha": 0.0, "beta": 0.0}
_PER = {"alpha": 0.6, "beta": 0.4}
_LAP = {"alpha": 0.4, "beta": 0.0, "eps": 0.0, "priority_clip": (1.0, None)}

ARMS = {
    "uniform": Arm(replay=_UNIFORM),
    "proportional": Arm(replay=_PER),
    "proportional, beta 0": Arm(replay=_PER | {"beta": 0.0}),
    "LAP": Arm(replay=_LAP),
    "uniform, lr x 4": Arm(lr=1e-3, replay=_UNIFORM),
    "uniform mix 0.1": Arm(replay=_PER | {"uniform_mix": 0.1}),
    "proportional, lr x 4": Arm(lr=1e-3, replay=_PER),
    "n-step 3, uniform": Arm(replay=_UNIFORM, n_step=3),
    "n-step 3, proportional": Arm(replay=_PER, n_step=3),
}
"""In the order in which they are run."""

QUICK = replace(Settings(), frames=3_000, explore_frames=1_000, diagnose_every=1_000)
