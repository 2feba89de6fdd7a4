"""Double dueling n-step DQN with prioritized replay on Atari games, frames kept once.

    pip install -c constraints.txt -e ".[examples]"
    python examples/rainbow_atari.py --game Pong --frames 2000000 --device cuda

Of Rainbow (Hessel et al. 2018, arXiv 1710.02298) it has double Q-learning, dueling heads, n-step
returns and prioritized replay. Every `--log-every` steps it appends a line to `log.csv` in the
folder `--out`, with the buffer's diagnostics, and with `--tensorboard` writes the same there. Every
`--save-every` steps it saves agent and buffer; `--resume` goes on from there.
"""

import argparse
import copy
import csv
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import ale_py
import gymnasium as gym
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from tqdm import tqdm

from per_td import LinearSchedule, NStepWriter, PrioritizedReplayBuffer

gym.register_envs(ale_py)


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    game: str = "Pong"  # as in ALE/Pong-v5
    frames: int = 10_000_000  # frames of the game, four for each step of an agent
    seed: int = 0  # of the games, the exploration and torch
    device: str = "cpu"  # where the network learns
    storage: str = "memory"  # of the buffer: "memory", "memmap" or "pinned"
    out: str = "runs/rainbow_atari"  # folder for log and checkpoints
    tensorboard: bool = False  # write the log for TensorBoard too
    resume: bool = False  # go on from the checkpoint in `out`
    num_envs: int = 8  # games side by side
    capacity: int = 1_000_000  # transitions in the buffer
    batch_size: int = 32  # transitions in a gradient step
    n_step: int = 3  # steps of a return
    gamma: float = 0.99  # discount factor
    alpha: float = 0.5  # exponent of the priorities
    beta: float = 0.4  # exponent of the weights at first; 1 at the end
    lr: float = 6.25e-5  # Adam's learning rate
    learning_starts: int = 20_000  # steps of agents before the first gradient step
    train_every: int = 4  # steps of agents for each gradient step
    target_every: int = 2_000  # gradient steps between copies to the target network
    explore_end: float = 0.01  # share of random actions after its decay
    explore_steps: int = 250_000  # steps of agents in which it falls from 1
    log_every: int = 10_000  # steps of agents between two lines of the log
    save_every: int = 1_000_000  # steps of agents between two checkpoints


class Network(nn.Module):
    """The convolutions of DQN, with dueling heads (Wang et al. 2016)."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.value = nn.Sequential(nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 1))
        self.advantage = nn.Sequential(nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, actions))

    def forward(self, pixels: Tensor) -> Tensor:
        """Action values [B, A] of stacks uint8 [B, 4, 84, 84]."""
        found = self.body(pixels.float() / 255)
        advantage = self.advantage(found)
        return self.value(found) + advantage - advantage.mean(-1, keepdim=True)


class Agent:
    """The network, its target, and its optimizer."""

    def __init__(self, actions: int, args: Args) -> None:
        self.args, self.updates = args, 0
        self.online = Network(actions).to(args.device)
        self.target = copy.deepcopy(self.online)
        self.optimizer = torch.optim.Adam(self.online.parameters(), args.lr, eps=1.5e-4)

    @torch.no_grad()
    def act(self, pixels: Tensor, epsilon: float) -> Tensor:
        """Actions [E], random ones with probability `epsilon`."""
        value = self.online(pixels.to(self.args.device)).cpu()
        random = torch.rand(len(pixels)) < epsilon
        return torch.where(random, torch.randint(value.shape[1], random.shape), value.argmax(-1))

    def learn(self, batch: TensorDict) -> tuple[Tensor, Tensor]:
        """Take a gradient step; return the loss, and the TD errors [B]."""
        with torch.no_grad():
            following = batch["next", "observation"]
            best = self.online(following).argmax(-1, keepdim=True)  # double Q-learning
            value = self.target(following).gather(-1, best).squeeze(-1)
            goal = batch["next", "reward"] + batch["discount"] * value
        action = batch["action"].unsqueeze(-1)
        value = self.online(batch["observation"]).gather(-1, action).squeeze(-1)
        error = nn.functional.smooth_l1_loss(value, goal, reduction="none")
        loss = (batch["priority_weight"] * error).mean()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), 10.0)
        self.optimizer.step()
        self.updates += 1
        if self.updates % self.args.target_every == 0:
            self.target.load_state_dict(self.online.state_dict())
        return loss.detach(), (goal - value).detach()

    def state_dict(self) -> dict:
        """For a checkpoint."""
        parts = (self.online, self.target, self.optimizer)
        return {"parts": [part.state_dict() for part in parts], "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        """Go on from a checkpoint."""
        for part, own in zip(
            (self.online, self.target, self.optimizer), state["parts"], strict=True
        ):
            part.load_state_dict(own)
        self.updates = state["updates"]


class Log:
    """Lines of a CSV file, and TensorBoard if wanted."""

    def __init__(self, args: Args) -> None:
        self.path, self.writer = Path(args.out) / "log.csv", None
        if args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(args.out)

    def write(self, step: int, line: dict[str, float]) -> None:
        """Append a line; all lines have the same keys."""
        line = {"step": step} | line
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            table = csv.DictWriter(file, line)
            if new:
                table.writeheader()
            table.writerow(line)
        for name, value in line.items():
            if self.writer is not None:
                self.writer.add_scalar(name, value, step)


def make_buffer(args: Args) -> PrioritizedReplayBuffer:
    """The replay buffer: each frame once, beta from `args.beta` to 1 over the run."""
    updates = max(1, (args.frames // 4 - args.learning_starts) // args.train_every)
    return PrioritizedReplayBuffer(
        args.capacity, args.batch_size, alpha=args.alpha, storage=args.storage,
        beta_schedule=LinearSchedule(args.beta, 1.0, updates),
        frames={"observation": 4}, num_envs=args.num_envs,
    )  # fmt: skip


def train(args: Args) -> dict[str, float]:
    """Learn; return the last line of the log."""
    torch.manual_seed(args.seed)
    folder, log, line = Path(args.out), None, {}
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(args)
    games = gym.make_vec(f"ALE/{args.game}-v5", num_envs=args.num_envs)
    agent = Agent(int(games.single_action_space.n), args)
    buffer = make_buffer(args)
    writer = NStepWriter(
        buffer, args.n_step, args.gamma, num_envs=args.num_envs, autoreset="next_step"
    )
    step, spent = 0, 0.0
    if args.resume:
        state = torch.load(folder / "agent.pt", weights_only=True)
        agent.load_state_dict(state["agent"])
        buffer.restore(folder / "buffer.pt")
        writer.load_state_dict(state["writer"])
        step = state["step"]
    returns, finished = torch.zeros(args.num_envs), deque(maxlen=20)
    pixels = torch.from_numpy(games.reset(seed=args.seed + step)[0])
    losses: list[Tensor] = []
    with tqdm(total=args.frames, initial=4 * step, unit=" frames", mininterval=1) as bar:
        while 4 * step < args.frames:
            epsilon = max(args.explore_end, 1 - step / args.explore_steps)
            action = agent.act(pixels, epsilon)
            after, reward, ended, cut, _ = games.step(action.numpy())
            following = torch.from_numpy(after)
            new = {
                "observation": following,
                "reward": torch.from_numpy(reward).float(),
                "terminated": torch.from_numpy(ended),
                "truncated": torch.from_numpy(cut),
            }
            data = {"observation": pixels, "action": action, "next": new}
            start = time.perf_counter()
            writer.add(TensorDict(data, [args.num_envs]))
            spent += time.perf_counter() - start
            pixels, returns = following, returns + new["reward"]
            for env in (new["terminated"] | new["truncated"]).nonzero().flatten().tolist():
                finished.append(float(returns[env]))
                returns[env] = 0
            step += args.num_envs
            bar.update(4 * args.num_envs)
            if step < args.learning_starts:
                continue
            for _ in range(max(1, args.num_envs // args.train_every)):
                start = time.perf_counter()
                batch = buffer.sample()
                spent += time.perf_counter() - start
                loss, td_error = agent.learn(batch.to(args.device))
                start = time.perf_counter()
                buffer.update_priority(batch["index"], td_error, batch["generation"])
                spent += time.perf_counter() - start
                losses.append(loss)
            if step % args.log_every < args.num_envs:
                mean = sum(finished) / len(finished) if finished else float("nan")
                line = {"return": mean, "epsilon": epsilon}
                line["loss"] = float(torch.stack(losses).mean())
                line["buffer_seconds"], losses = spent, []
                line |= {name: float(value) for name, value in buffer.diagnostics().items()}
                log.write(step, line)
                bar.set_postfix({"return": mean, "loss": line["loss"]})
            if step % args.save_every < args.num_envs:
                state = {"agent": agent.state_dict(), "writer": writer.state_dict(), "step": step}
                torch.save(state, folder / "agent.pt")
                buffer.save(folder / "buffer.pt")
    print(f"{buffer!r}: {spent:.1f} s, {buffer.nbytes / 1e9:.2f} GB")
    return line


def main() -> None:
    """Read the command line, and learn."""
    parser = argparse.ArgumentParser(description=__doc__)
    for field in fields(Args):
        name = f"--{field.name.replace('_', '-')}"
        if field.type is bool:
            parser.add_argument(name, action="store_true")
        else:
            parser.add_argument(name, type=field.type, default=field.default)
    args = Args(**vars(parser.parse_args()))
    print(asdict(args))
    train(args)


if __name__ == "__main__":
    main()
