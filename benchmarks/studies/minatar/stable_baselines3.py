"""The same question for another agent: Stable-Baselines3's DQN, with its buffer and with ours.

python -m benchmarks.studies.minatar.stable_baselines3 --jobs 1   # goes on where it was interrupted
python -m benchmarks.studies.minatar.stable_baselines3 --quick    # a minute: see that it works
python -m benchmarks.studies.minatar.stable_baselines3 --report   # only the table

Both agents are `PrioritizedDQN` of examples/stable_baselines3_dqn.py; they differ in their buffer
alone. Settings are the study's, with fewer frames. Where the study has none, they are SB3's: it
clips gradients at a norm of 10.
"""

import argparse
import importlib.util
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
import torch
from minatar import Environment
from numpy.typing import NDArray
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from benchmarks.machine import machine, versions
from benchmarks.pages import RESULTS, table
from benchmarks.studies.minatar.jobs import file_of, save
from benchmarks.studies.minatar.report import Runs
from benchmarks.studies.minatar.settings import ARMS, GAMES, QUICK, Settings
from benchmarks.studies.statistics_of_runs import bootstrap, improvement_interval, mean

EXAMPLE = Path(__file__).parents[3] / "examples" / "stable_baselines3_dqn.py"
OUT, QUICK_OUT = RESULTS / "minatar_study" / "sb3", Path("runs/minatar_study_sb3")
COMPARED = ("uniform", "proportional")


def load_example() -> ModuleType:
    """Load the example whose classes both agents use."""
    spec = importlib.util.spec_from_file_location("stable_baselines3_dqn", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()


class MinAtar(gymnasium.Env):
    """A game of MinAtar with its minimal actions; images bool [channels, 10, 10]."""

    def __init__(self, game: str, sticky: float) -> None:
        self.game = Environment(game, sticky_action_prob=sticky)
        self.actions = self.game.minimal_action_set()
        height, width, channels = self.game.state_shape()
        self.observation_space = gymnasium.spaces.Box(0, 1, (channels, height, width), bool)
        self.action_space = gymnasium.spaces.Discrete(len(self.actions))

    def _image(self) -> NDArray[np.bool_]:
        return np.ascontiguousarray(self.game.state().transpose(2, 0, 1))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[NDArray, dict]:
        """Start an episode."""
        self.game.seed(seed)  # None leaves the random numbers as they are
        self.game.reset()
        return self._image(), {}

    def step(self, action: int) -> tuple[NDArray, float, bool, bool, dict]:
        """Take an action; there is no time limit."""
        reward, ended = self.game.act(self.actions[action])
        return self._image(), float(reward), bool(ended), False, {}


class Convolution(BaseFeaturesExtractor):
    """The layers of networks.py but the last, which SB3 adds; torch draws the parameters."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, 128)
        filters = nn.Conv2d(space.shape[0], 16, 3)
        self.layers = nn.Sequential(
            filters, nn.ReLU(), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU()
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features [B, 128] of images float32 [B, channels, 10, 10]."""
        return self.layers(images)


class Uniform(ReplayBuffer):
    """SB3's own buffer; its draws have weights of 1, and nothing is done with TD errors."""

    def sample(self, batch_size: int, env: Any = None) -> Any:
        """Draw a batch."""
        *stored, _ = super().sample(batch_size, env)
        return example.Samples(*stored, torch.ones(batch_size, 1), None, None)

    def update_priority(self, batch: Any, td_error: Tensor) -> None:
        """There are none."""


def make_agent(settings: Settings, arm: str, env: gymnasium.Env, seed: int) -> Any:
    """Make a DQN; agents differ in their buffer alone."""
    prioritized = arm != "uniform"
    return example.PrioritizedDQN(
        "MlpPolicy",  # the features extractor makes it convolutional
        env,
        learning_rate=ARMS[arm].lr,
        buffer_size=settings.capacity,
        learning_starts=settings.learning_starts,
        batch_size=settings.batch_size,
        gamma=settings.gamma,
        train_freq=settings.update_every,
        target_update_interval=settings.copy_every,
        exploration_fraction=settings.explore_frames / settings.frames,
        exploration_final_eps=settings.explore_end,
        replay_buffer_class=example.PrioritizedReplay if prioritized else Uniform,
        replay_buffer_kwargs=ARMS[arm].replay if prioritized else {},
        policy_kwargs={
            "features_extractor_class": Convolution,
            "net_arch": [],
            "optimizer_kwargs": {"eps": 3.125e-4, "fused": True},
        },
        seed=seed,
        device="cpu",
    )


def train(settings: Settings, game: str, arm: str, seed: int) -> tuple[NDArray, NDArray, float]:
    """Train one agent; ends int32 [1, episodes], returns float32 [1, episodes], seconds."""
    start = time.perf_counter()
    env = Monitor(MinAtar(game, settings.sticky))
    make_agent(settings, arm, env, seed).learn(settings.frames)
    ends = np.cumsum(env.get_episode_lengths() or [0], dtype=np.int32)
    returns = np.array(env.get_episode_rewards() or [0], np.float32)
    return ends[None], returns[None], time.perf_counter() - start


def file_of_seed(out: Path, game: str, arm: str, seed: int) -> Path:
    """The file of one run."""
    return file_of(out, game, f"{arm} {seed}")


def work(game: str, arm: str, seed: int, settings: Settings, out: Path) -> str:
    """Run an agent with a seed, unless its file is there; a line about it."""
    file = file_of_seed(out, game, arm, seed)
    if file.exists():
        if (found := Runs(file).about["settings"]) != asdict(settings):
            raise SystemExit(f"{file}: expected runs with {asdict(settings)}, got {found}")
        return f"{file.name}: there already"
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    ends, returns, seconds = train(settings, game, arm, seed)
    about = {"settings": asdict(settings), "arm": asdict(ARMS[arm]), "runs": 1, "seed": seed}
    about |= {"seconds": round(seconds, 1), "machine": machine(), "versions": versions()}
    save(file, about, ends=ends, returns=returns)
    return f"{file.name}: {seconds:.0f} s, {settings.frames / seconds:.0f} frames/s"


def report(out: Path, games: list[str], seeds: int) -> str:
    """Make the table of the files that there are, and write it beside them."""
    body = []
    for game in games:
        scores: dict[str, list[NDArray]] = {}
        for arm in COMPARED:
            files = [file_of_seed(out, game, arm, seed) for seed in range(seeds)]
            if not (runs := [Runs(file) for file in files if file.exists()]):
                continue
            frames = runs[0].about["settings"]["frames"]
            scores[arm] = [
                np.concatenate([run.mean_return(int(0.75 * frames), frames) for run in runs]),
                np.concatenate([run.windows()[1].mean(1) for run in runs]),
            ]
            line = [f"{game}, {arm}", len(runs), f"{frames:,}"]
            for i, score in enumerate(scores[arm]):
                found = [np.squeeze(limit) for limit in bootstrap(score[:, None], mean)]
                line.append("{:.2f} [{:.2f}, {:.2f}]".format(*found))
                chance = ""
                if arm != "uniform" and "uniform" in scores:
                    values = improvement_interval([(score, scores["uniform"][i])])
                    chance = "{:.2f} [{:.2f}, {:.2f}]".format(*values)
                line.append(chance)
            body.append(line)
    if not body:
        return f"no results in {out}"
    head = ["agent", "runs", "frames", "mean, last quarter", "P(better than uniform)"]
    text = table([*head, "mean, whole run", "P(better than uniform)"], body)
    (out / "tables.md").write_text(text + "\n")
    return text


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.minatar.stable_baselines3")
    parser.add_argument("--games", nargs="+", choices=GAMES, default=[GAMES[0]])
    parser.add_argument("--frames", type=int, help="of each run; exploration falls in half of it")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each agent")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--quick", action="store_true", help="short runs: see that it works")
    parser.add_argument("--report", action="store_true", help="only the table")
    parser.add_argument("--out", type=Path, help="folder of the files")
    args = parser.parse_args(argv)
    args.frames = args.frames or (QUICK.frames if args.quick else 100_000)
    args.out = args.out or (QUICK_OUT if args.quick else OUT)
    return args


def main(argv: list[str] | None = None) -> None:
    """Run what has no file yet, then report."""
    args = parse(argv)
    base = QUICK if args.quick else Settings()
    explore = min(Settings.explore_frames, args.frames // 2)
    settings = replace(base, frames=args.frames, explore_frames=explore)
    if not args.report:
        tasks = [
            (game, arm, seed, settings, args.out)
            for seed in range(args.seeds)
            for game in args.games
            for arm in COMPARED
        ]
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            for line in pool.map(work, *zip(*tasks, strict=True)):
                print(line, flush=True)
    print(report(args.out, args.games, args.seeds))


if __name__ == "__main__":
    main()
