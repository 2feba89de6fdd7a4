"""Sharded replay over Ray: what batches cost beside Ray's own copies and TorchRL's Ray buffer.

    python -m benchmarks.ray_shards
    # writes benchmarks/results/ray.{json,md} and the table of docs/ray.md

Every rate is the median of `--rounds` rounds, after a round of warm-up, in one process that learns
nothing: sampling as fast as it can. On a machine with fewer cores than processes (shards, the
learner, Ray's own), more shards cannot be faster: look at the ratios to Ray's copy of the same
bytes, which pays for the same cores. k is `batches_per_request`; a round has whole requests.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import ray
import torch
from tensordict import TensorDict

from benchmarks.arguments import option, parse_args
from benchmarks.machine import about
from benchmarks.pages import DOCS, RESULTS, fill, save, table
from per_td import PrioritizedReplayBuffer
from per_td.ray import ShardedReplayBuffer

ACTIONS = ("sample", "sample + update", "extend")


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    shards: str = option("1,2,4", "numbers of shards, with commas")
    requests: str = option("1,4,16", "numbers k of batches in a request, with commas")
    batch: int = option(256, "transitions in a batch")
    small: int = option(20_000, "CartPole-like transitions, 41 bytes")
    frames: int = option(3_000, "Atari-like transitions, 28 kB")
    calls: int = option(32, "calls in a round, a multiple of each k")
    rounds: int = option(9, "rounds of each measurement")
    torchrl: int = option(1, "0 leaves out TorchRL's buffers")
    out: str = option(str(RESULTS / "ray"), "files, without suffix")


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


def row(name: str, call: Callable[[], object], size: int, args: Args) -> dict:
    """Time a call that moves `size` bytes: a line of the table."""
    seconds = seconds_per_call(call, args)
    print(f"{name}: {seconds * 1e6:,.0f} us", flush=True)
    return {
        "name": name,
        "us_per_batch": round(seconds * 1e6, 1),
        "samples_per_s": round(args.batch / seconds),
        "mb_per_s": round(size / seconds / 1e6, 2),
    }


def ray_copies(size: int, args: Args) -> list[dict]:
    """Time Ray handing over so many bytes, from an actor and in one process, and one copy."""

    class Source:
        def __init__(self) -> None:
            self.data = np.zeros(size, np.uint8)

        def get(self) -> np.ndarray:
            return self.data

    source, data = ray.remote(num_cpus=0)(Source).remote(), np.zeros(size, np.uint8)
    calls = {
        "Ray: an actor's bytes, copied once": lambda: ray.get(source.get.remote()).copy(),
        "Ray: put, get, copied once": lambda: ray.get(ray.put(data)).copy(),
    }
    rows = [row(name, call, size, args) for name, call in calls.items()]
    ray.kill(source)
    return rows


def train_step(buffer, batch_size: int) -> None:
    """A batch and its update, without the learning between them."""
    batch = buffer.sample(batch_size)
    batch["td_error"] = torch.rand(batch_size)
    buffer.update_tensordict_priority(batch)


def sharded_rows(data: TensorDict, num_shards: int, size: int, args: Args) -> list:
    """Ours, without and with batches asked for ahead, and k of them at a time."""
    rows = []
    options = {"actor_options": {"num_cpus": 0}, "timeout_s": 60.0}
    name = f"{num_shards} shard{'s' * (num_shards > 1)}"
    shape = (num_shards, 2 * len(data) // num_shards)
    own = f"{name} for {size} bytes"
    parts = data.split(args.batch)
    with ShardedReplayBuffer(*shape, name=own, **options) as buffer:
        for part in parts:
            buffer.extend(part, torch.rand(len(part)))
        ahead = [
            (f", prefetch=2, k={k}", {"prefetch": 2, "batches_per_request": k})
            for k in map(int, args.requests.split(","))
        ]
        for how, asked in [("", {}), *ahead]:  # another learner each time; the shards are the same
            learner = ShardedReplayBuffer(*shape, name=own, **options, **asked)
            calls = (learner.sample, partial(train_step, learner))
            for what, call in zip(ACTIONS, calls, strict=False):
                rows.append(row(f"{name}{how}: {what}", partial(call, args.batch), size, args))
            learner.flush()
        rows.append(row(f"{name}: extend", partial(buffer.extend, parts[0]), size, args))
    if num_shards > 1:
        return rows
    for fsync in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            durable = {"checkpoint_dir": folder, "checkpoint_every": 10**9, "fsync": fsync}
            name = f"1 shard, log{' and fsync' * fsync}: extend"
            with ShardedReplayBuffer(1, len(data), **options, **durable) as buffer:
                rows.append(row(name, partial(buffer.extend, parts[0]), size, args))
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
        rows.append(row(f"{name}: sample", buffer.sample, size, args))
        if extra:
            step = partial(train_step, buffer, args.batch)
            rows.append(row(f"{name}: sample + update", step, size, args))
        rows.append(row(f"{name}: extend", partial(buffer.extend, data[: args.batch]), size, args))
        buffer.close()
    return rows


def measure(kind: str, n: int, args: Args) -> dict:
    """All rows for one kind of transitions."""
    data = transitions(kind, n)
    size = nbytes(data[: args.batch])
    rows = ray_copies(size, args)
    local = PrioritizedReplayBuffer(2 * n, args.batch)
    local.extend(data, torch.rand(n))
    rows.append(row("local buffer: sample", local.sample, size, args))
    for num_shards in map(int, args.shards.split(",")):
        rows += sharded_rows(data, num_shards, size, args)
    if args.torchrl:
        rows += torchrl_rows(data, size, args)
    floor = rows[0]["us_per_batch"]
    for each in rows:
        each["times_ray_copy"] = round(each["us_per_batch"] / floor, 2)
    return {"kind": kind, "transitions": n, "bytes_per_batch": size, "rows": rows}


def page(results: dict) -> str:
    """Write the results in Markdown."""
    args, info = results["args"], results["machine"]
    parts = [
        "# Sharded replay over Ray",
        f"`python -m benchmarks.ray_shards` on {info['cpu']}, {info['cores']} cores, load before"
        f" {info['load_before']}; ray {results['ray']}, torch {results['versions']['torch']};"
        f" batches of {args['batch']}, {args['rounds']} rounds of {args['calls']} calls.",
    ]
    formats = "{name}", "{us_per_batch:,.0f}", "{samples_per_s:,}", "{mb_per_s:,.1f}"
    formats += ("{times_ray_copy:.2f}",)
    for kind in results["kinds"]:
        size = f"{kind['transitions']:,} transitions, {kind['bytes_per_batch']:,} bytes per batch"
        body = [[cell.format(**row) for cell in formats] for row in kind["rows"]]
        head = ["", "us per batch", "samples/s", "MB/s", "times Ray's copy"]
        parts += [f"## {kind['kind']}: {size}", table(head, body)]
    return "\n\n".join(parts)


def published(results: dict) -> str:
    """Make the table of docs/ray.md: microseconds, and times Ray's own copy."""
    lines: dict[str, list[str]] = {}
    head = [""]
    for kind in results["kinds"]:
        head += [f"{kind['kind']}: {action}" for action in ACTIONS]
    for at, kind in enumerate(results["kinds"]):
        for row in kind["rows"]:
            name, _, action = row["name"].partition(": ")
            if row is kind["rows"][0]:
                name, action = "Ray's own copy", "sample"
            if action in ACTIONS:
                cells = lines.setdefault(name, [""] * (len(head) - 1))
                text = f"{row['us_per_batch']:,.0f} ({row['times_ray_copy']:.1f})"
                cells[len(ACTIONS) * at + ACTIONS.index(action)] = text
    return table(head, [[name, *cells] for name, cells in lines.items()])


def main(args: Args) -> dict:
    """Measure, print, write."""
    torch.set_num_threads(1)
    info = about()
    ray.init(
        include_dashboard=False,
        object_store_memory=2**30,
        num_cpus=8,
        log_to_driver=False,
        namespace="benchmark",  # shards with a name want one
    )
    try:
        kinds = [measure("small", args.small, args), measure("frames", args.frames, args)]
    finally:
        ray.shutdown()
    results = {
        "args": asdict(args),
        **info,
        "ray": ray.__version__,
        "kinds": kinds,
    }
    save(args.out, results, page(results))
    if args.out == Args().out:
        fill(DOCS / "ray.md", published(results))
    return results


if __name__ == "__main__":
    main(parse_args(Args, __doc__.splitlines()[0]))
