"""Log the diagnostics of a buffer to TensorBoard, Weights & Biases or a CSV file.

    pip install -c constraints.txt -e . tensorboard
    python examples/log_diagnostics.py              # TensorBoard; a CSV file if it is not installed
    python examples/log_diagnostics.py --wandb      # Weights & Biases, offline
    tensorboard --logdir runs/log_diagnostics

Copy `make_log` and `figures_of`. The task is a stand-in: it learns the values of a random walk.
"""

import argparse
import csv
from collections.abc import Callable
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from per_td import PrioritizedReplayBuffer

Log = Callable[[dict[str, float], int], None]


def csv_log(file: Path) -> Log:
    """Write a line for each call, with the keys of the first as head."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)

    def log(figures: dict[str, float], step: int) -> None:
        head = not file.exists()
        with file.open("a", newline="") as out:
            writer = csv.writer(out)
            if head:
                writer.writerow(["step", *figures])
            writer.writerow([step, *figures.values()])

    return log


def make_log(folder: Path, wandb: bool) -> Log:
    """Log to W&B if asked, else to TensorBoard if it is installed, else to a CSV file."""
    folder.mkdir(parents=True, exist_ok=True)
    if wandb:
        import wandb as weights_and_biases

        run = weights_and_biases.init(project="per_td", dir=folder, mode="offline")
        return lambda figures, step: run.log(figures, step=step)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return csv_log(folder / "diagnostics.csv")
    writer = SummaryWriter(str(folder))

    def log(figures: dict[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def figures_of(buffer: PrioritizedReplayBuffer) -> dict[str, float]:
    """Return the diagnostics as numbers; the host waits for the device once."""
    found = buffer.diagnostics()
    values = torch.stack([value.double() for value in found.values()]).tolist()
    return {f"replay/{name}": value for name, value in zip(found, values, strict=True)}


def walk(start: Tensor) -> TensorDict:
    """One step from each of the states 1 to 19; a reward of 1 at 20, the end is there and at 0."""
    after = start + 2 * torch.randint(2, start.shape) - 1
    ended = (after == 0) | (after == 20)
    rows = {"state": start, "after": after, "reward": (after == 20).float(), "ended": ended}
    return TensorDict(rows, start.shape)


def main(args: argparse.Namespace) -> tuple[PrioritizedReplayBuffer, Tensor]:
    """Train; the buffer, and the values of the states [21]."""
    torch.manual_seed(args.seed)
    buffer = PrioritizedReplayBuffer(5_000, batch_size=64, alpha=0.6, beta=0.4, track_draws=True)
    values = nn.Embedding(21, 1, _weight=torch.zeros(21, 1))
    optimizer = torch.optim.Adam(values.parameters(), 0.01)
    log, state = make_log(args.out, args.wandb), torch.randint(1, 20, (16,))
    for step in range(1, args.steps + 1):
        rows = walk(state)
        buffer.extend(rows)
        state = torch.where(rows["ended"], torch.randint(1, 20, (16,)), rows["after"])
        batch = buffer.sample()
        with torch.no_grad():
            following = ~batch["ended"] * values(batch["after"]).squeeze(-1)
        error = batch["reward"] + following - values(batch["state"]).squeeze(-1)
        loss = (batch["priority_weight"] * error**2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        buffer.update_priority(batch["index"], error.detach(), batch["generation"])
        if step % args.log_every == 0:
            log({"loss": loss.item(), **figures_of(buffer)}, step)
    print(f"logged to {args.out}")
    return buffer, values.weight.detach().squeeze(-1)


def parse_args(argv=None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/log_diagnostics"), help="folder")
    parser.add_argument("--wandb", action="store_true", help="to Weights & Biases, offline")
    parser.add_argument("--steps", type=int, default=2_000, help="gradient steps")
    parser.add_argument("--log-every", type=int, default=100, help="gradient steps")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(parse_args())
