"""Sharded replay over Ray: what batches cost beside Ray's own copies and TorchRL's Ray buffer.

    python -m benchmarks.ray_shards            # writes benchmarks/results/ray.{json,md}

Every rate is the median of `--rounds` rounds, after a round of warm-up, in one process that learns
nothing: sampling as fast as it can. On a machine with fewer cores than processes (shards, the
learner, Ray's own), more shards cannot be faster: look at the ratios to Ray's copy of the same
bytes, which pays for the same cores.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import ray
import torch
from tensordict import TensorDict

from benchmarks.arguments import parse_args
from benchmarks.machine import commit, machine, versions
from per_td import PrioritizedReplayBuffer
from per_td.ray import ShardedReplayBuffer

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    shards: str = field(default="1,2,4", metadata={"help": "numbers of shards, with commas"})
    batch: int = field(default=256, metadata={"help": "transitions in a batch"})
    small: int = field(default=20_000, metadata={"help": "CartPole-like transitions, 41 bytes"})
    frames: int = field(default=3_000, metadata={"help": "Atari-like transitions, 28 kB"})
    calls: int = field(default=20, metadata={"help": "calls in a round"})
    rounds: int = field(default=9, metadata={"help": "rounds of each measurement"})
    torchrl: int = field(default=1, metadata={"help": "0 leaves out TorchRL's buffers"})
    out: str = field(default=str(RESULTS / "ray"), metadata={"help": "files, without suffix"})


def transitions(kind: str, n: int) -> TensorDict:
    """Transitions [n] like those of CartPole ("small") or of Atari ("frames")."""
    if kind == "frames":
        pixels = torch.randint(255, (n, 4, 84, 84), dtype=torch.uint8)
        return TensorDict({"frames": pixels, "reward": torch.rand(n)}, [n])
    return TensorDict(
        {
            "state": torch.rand(n, 4),
            "next": {"state": torch.rand(n, 4), "done": torch.zeros(n, dtype=torch.bool)},
            "action": torch.zeros(n, dtype=torch.int32),
            "reward": torch.rand(n),
        },
        [n],
    )


def nbytes(data: TensorDict) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in data.values(True, True))


def seconds_per_call(call: Callable[[], object], args: Args) -> float:
    """Median over rounds of the mean over calls."""
    times = []
    for _ in range(args.rounds + 1):
        start = time.perf_counter()
        for _ in range(args.calls):
            call()
        times.append((time.perf_counter() - start) / args.calls)
    return statistics.median(times[1:])


def row(name: str, seconds: float, batch: int, size: int) -> dict:
    """A line of the table."""
    print(f"{name}: {seconds * 1e6:,.0f} us", flush=True)
    return {
        "name": name,
        "us_per_batch": round(seconds * 1e6, 1),
        "samples_per_s": round(batch / seconds),
        "mb_per_s": round(size / seconds / 1e6, 2),
    }


def ray_copy(size: int, args: Args) -> float:
    """Seconds that Ray takes to hand over so many bytes from an actor, and one copy of them."""

    class Source:
        def __init__(self) -> None:
            self.data = np.zeros(size, np.uint8)

        def get(self) -> np.ndarray:
            return self.data

    source = ray.remote(num_cpus=0)(Source).remote()
    seconds = seconds_per_call(lambda: ray.get(source.get.remote()).copy(), args)
    ray.kill(source)
    return seconds


def put_get(size: int, args: Args) -> float:
    """Seconds of ray.put and ray.get of so many bytes in one process, and one copy of them."""
    data = np.zeros(size, np.uint8)
    return seconds_per_call(lambda: ray.get(ray.put(data)).copy(), args)


def train_step(buffer, batch_size: int) -> None:
    """A batch and its update, without the learning between them."""
    batch = buffer.sample(batch_size)
    batch["td_error"] = torch.rand(batch_size)
    buffer.update_tensordict_priority(batch)


def sharded_rows(data: TensorDict, num_shards: int, size: int, args: Args) -> list:
    """Ours, without and with batches asked for ahead."""
    rows = []
    options = {"actor_options": {"num_cpus": 0}, "timeout_s": 60.0}
    name = f"{num_shards} shard{'s' * (num_shards > 1)}"
    parts = data.split(args.batch)
    with ShardedReplayBuffer(num_shards, 2 * len(data) // num_shards, **options) as buffer:
        for part in parts:
            buffer.extend(part, torch.rand(len(part)))
        for prefetch in (0, 2):
            buffer._prefetch = prefetch
            ahead = f", prefetch={prefetch}" * bool(prefetch)
            for what, call in (("sample", buffer.sample), ("sample + update", None)):
                call = partial(call or partial(train_step, buffer), args.batch)
                seconds = seconds_per_call(call, args)
                rows.append(row(f"{name}{ahead}: {what}", seconds, args.batch, size))
        seconds = seconds_per_call(lambda: buffer.extend(parts[0]), args)
        rows.append(row(f"{name}: extend", seconds, args.batch, size))
    if num_shards > 1:
        return rows
    for fsync in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            durable = {"checkpoint_dir": folder, "checkpoint_every": 10**9, "fsync": fsync}
            with ShardedReplayBuffer(1, len(data), **options, **durable) as buffer:
                seconds = seconds_per_call(lambda b=buffer: b.extend(parts[0]), args)
        name = f"1 shard, log{' and fsync' * fsync}: extend"
        rows.append(row(name, seconds, args.batch, size))
    return rows


def torchrl_rows(data: TensorDict, size: int, args: Args) -> list:
    """TorchRL's RayReplayBuffer: uniform, and with per_td's priorities inside."""
    from torchrl.data.replay_buffers import (
        LazyTensorStorage,
        RayReplayBuffer,
        TensorDictReplayBuffer,
    )

    from per_td.torchrl import TensorDictPrioritizedReplayBuffer

    class Prioritized(TensorDictPrioritizedReplayBuffer):
        def __init__(self, *, delayed_init: bool = False, **settings) -> None:
            super().__init__(**settings)

    rows = []
    for name, kind, extra in (
        ("TorchRL RayReplayBuffer, uniform", TensorDictReplayBuffer, {}),
        ("TorchRL RayReplayBuffer, per_td inside", Prioritized, {"alpha": 0.6, "beta": 0.4}),
    ):
        buffer = RayReplayBuffer(
            replay_buffer_cls=kind,
            storage=partial(LazyTensorStorage, 2 * len(data)),
            batch_size=args.batch,
            remote_config={"num_cpus": 0},
            **extra,
        )
        for part in data.split(args.batch):
            buffer.extend(part)
        seconds = seconds_per_call(buffer.sample, args)
        rows.append(row(f"{name}: sample", seconds, args.batch, size))
        if extra:
            seconds = seconds_per_call(lambda b=buffer: train_step(b, args.batch), args)
            rows.append(row(f"{name}: sample + update", seconds, args.batch, size))
        part = data[: args.batch]
        seconds = seconds_per_call(lambda b=buffer, p=part: b.extend(p), args)
        rows.append(row(f"{name}: extend", seconds, args.batch, size))
        buffer.close()
    return rows


def measure(kind: str, n: int, args: Args) -> dict:
    """All rows for one kind of transitions."""
    data = transitions(kind, n)
    size = nbytes(data[: args.batch])
    rows = [row("Ray: an actor's bytes, copied once", ray_copy(size, args), args.batch, size)]
    rows.append(row("Ray: put, get, copied once", put_get(size, args), args.batch, size))
    local = PrioritizedReplayBuffer(2 * n, args.batch)
    local.extend(data, torch.rand(n))
    rows.append(row("local buffer: sample", seconds_per_call(local.sample, args), args.batch, size))
    for num_shards in map(int, args.shards.split(",")):
        rows += sharded_rows(data, num_shards, size, args)
    if args.torchrl:
        rows += torchrl_rows(data, size, args)
    floor = rows[0]["us_per_batch"]
    for each in rows:
        each["times_ray_copy"] = round(each["us_per_batch"] / floor, 2)
    return {"kind": kind, "transitions": n, "bytes_per_batch": size, "rows": rows}


def table(results: dict) -> str:
    """The results in Markdown."""
    args, info = results["args"], results["machine"]
    lines = [
        "# Sharded replay over Ray",
        "",
        f"`python -m benchmarks.ray_shards` on {info['cpu']}, {info['cores']} cores, load before"
        f" {info['load_before']}; ray {results['ray']}, torch {results['versions']['torch']};"
        f" batches of {args['batch']}, {args['rounds']} rounds of {args['calls']} calls.",
        "",
    ]
    for kind in results["kinds"]:
        lines += [
            f"## {kind['kind']}: {kind['transitions']:,} transitions,"
            f" {kind['bytes_per_batch']:,} bytes per batch",
            "",
            "| | us per batch | samples/s | MB/s | times Ray's copy |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {r['name']} | {r['us_per_batch']:,.0f} | {r['samples_per_s']:,} |"
            f" {r['mb_per_s']:,.1f} | {r['times_ray_copy']:.2f} |"
            for r in kind["rows"]
        ]
        lines.append("")
    return "\n".join(lines)


def main(args: Args) -> dict:
    """Measure, print, write."""
    torch.set_num_threads(1)
    info = machine()
    ray.init(include_dashboard=False, object_store_memory=2**30, num_cpus=8, log_to_driver=False)
    try:
        kinds = [measure("small", args.small, args), measure("frames", args.frames, args)]
    finally:
        ray.shutdown()
    results = {
        "args": asdict(args),
        "machine": info,
        "versions": versions(),
        "ray": ray.__version__,
        "commit": commit(),
        "kinds": kinds,
    }
    print(table(results))
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    Path(args.out + ".json").write_text(json.dumps(results, indent=1) + "\n")
    Path(args.out + ".md").write_text(table(results))
    return results


if __name__ == "__main__":
    main(parse_args(Args, __doc__.splitlines()[0]))
