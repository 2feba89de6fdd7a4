"""Memory and time of a buffer that keeps each frame of Atari-like stacks once.

    python -m benchmarks.studies.frames
    # prints memory of 10^6 transitions (7.6 GB are needed), and times beside whole stacks

Episodes of eight made-up environments last 500 to 3,000 steps, and every frame is a new one. The
memory is what the process grows by while the buffer fills, its frames a little more than once.
Times are medians on one thread; the buffer of whole stacks is smaller, so that it fits.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tensordict import TensorDict

from benchmarks.arguments import option, parse_args
from benchmarks.machine import machine
from per_td import PrioritizedReplayBuffer

DEPTH, SIDE = 4, 84


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    capacity: int = option(10**6, "transitions")
    whole: int = option(50_000, "transitions of the buffer of whole stacks, 56 kB each")
    envs: int = option(8, "environments")
    batch: int = option(32, "transitions of a sample")
    seed: int = option(0, "seed of the made-up frames")


def resident() -> int:
    """Bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024


def steps(envs: int, seed: int) -> Iterator[TensorDict]:
    """One step of each environment after the other, for ever; no two frames are alike."""
    random = torch.Generator().manual_seed(seed)
    pool = torch.randint(0, 256, (997, SIDE, SIDE), dtype=torch.uint8, generator=random)
    shown = 0

    def new(n: int) -> torch.Tensor:
        nonlocal shown
        frames = pool[torch.randint(997, (n,), generator=random)]
        frames.view(n, -1)[:, :8] = torch.arange(shown, shown + n).view(torch.uint8).view(n, 8)
        shown += n
        return frames

    stacks = new(envs).unsqueeze(1).repeat(1, DEPTH, 1, 1)
    left = torch.randint(500, 3000, (envs,), generator=random)
    while True:
        after = torch.cat([stacks[:, 1:], new(envs).unsqueeze(1)], 1)
        left -= 1
        following = {"pixels": after, "reward": torch.zeros(envs), "terminated": left == 0}
        action = torch.zeros(envs, dtype=torch.int64)
        yield TensorDict({"pixels": stacks, "action": action, "next": following}, [envs])
        stacks = after
        for e in (left == 0).nonzero().flatten().tolist():
            stacks[e] = new(1)
            left[e] = int(torch.randint(500, 3000, (), generator=random))


def median_us(call: Callable[[], object], repeats: int = 500) -> float:
    """Median microseconds of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def fill(buffer: PrioritizedReplayBuffer, args: Args) -> list[float]:
    """Fill a buffer a little more than once; return the seconds of each `extend`."""
    times = []
    source = steps(args.envs, args.seed)
    for _ in range(int(1.15 * buffer.capacity) // args.envs):
        td = next(source)
        start = time.perf_counter()
        buffer.extend(td)
        times.append(time.perf_counter() - start)
    return times


def measure(args: Args, capacity: int, **settings: object) -> str:
    """Fill a buffer; return its memory and times."""
    small = PrioritizedReplayBuffer(100, **settings)  # type: ignore[arg-type]  # loads the kernels
    fill(small, args)
    small.sample(args.batch)
    before = resident()
    buffer = PrioritizedReplayBuffer(capacity, **settings)  # type: ignore[arg-type]
    times = fill(buffer, args)
    grown = (resident() - before) / 1e9
    extend = statistics.median(times[-len(times) // 8 :]) * 1e6
    sample = median_us(lambda: buffer.sample(args.batch))
    return (
        f"{capacity:,} transitions in {grown:.2f} GB, extend of {args.envs} {extend:.0f} us, sample"
        f" of {args.batch} {sample:.0f} us, {buffer.stats()}"
    )


def copied(args: Args) -> float:
    """Median microseconds to copy the stacks of a batch from random places."""
    stacks = torch.ones(args.whole // 20, DEPTH, SIDE, SIDE, dtype=torch.uint8)
    places = torch.randint(len(stacks), (500, 2, args.batch))
    each = iter(places)
    return median_us(lambda: [stacks.index_select(0, place) for place in next(each)])


def main() -> None:
    """Measure and print."""
    args = parse_args(Args, __doc__)
    torch.set_num_threads(1)
    print(machine())
    print("whole stacks:", measure(args, args.whole))
    once = measure(args, args.capacity, frames={"pixels": DEPTH}, num_envs=args.envs)
    print("each frame once:", once)
    print(f"copy of the stacks of a batch: {copied(args):.0f} us")


if __name__ == "__main__":
    main()
