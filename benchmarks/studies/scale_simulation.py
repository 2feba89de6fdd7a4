"""The limits of a replay of 10^3 shards: the learner's work per batch, and stale totals.

    python -m benchmarks.studies.scale_simulation
    # writes benchmarks/results/scale.{json,md} and the table of docs/scale.md

No shard is started: answers are made up, and what the learner does with them is timed (`Batches`
without Ray; the process's own time, whatever else the machine does). How fast Ray carries small
messages is measured with two actors. Stale totals are simulated: bias and spread of the weighted
mean, summed up exactly over all shards.
"""

import pickle
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import ray
import torch

from benchmarks.arguments import option, parse_args
from benchmarks.machine import about
from benchmarks.pages import DOCS, RESULTS, fill, number, save, table
from per_td.ray.batches import Batches, counts_of, deal, shares_of
from per_td.ray.exchange import Ledger
from per_td.ray.shard import Drawn, Report


@dataclass
class Args:
    """The settings of a run; each is a command-line option too."""

    shards: int = option(1000, "shards K")
    requests: str = option("1,4,16", "numbers k of batches in a request, with commas")
    messages: int = option(4000, "calls of the message measurement")
    repeats: int = option(15, "of each timing; the median counts")
    out: str = option(str(RESULTS / "scale"), "files, without suffix")


def median_us(
    call: Callable[[], object], repeats: int, clock: Callable[[], float] = time.process_time
) -> float:
    """Median microseconds of a call after one of warm-up, by default those of this process."""
    times = []
    for _ in range(repeats + 1):
        start = clock()
        call()
        times.append(clock() - start)
    return statistics.median(times[1:]) * 1e6


class NoReplies:
    """In place of `Replies`: reports go to the ledger, and nobody is asked."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def note(self, shard: int, report: Report) -> None:
        """Take up a report."""
        self.ledger.note(shard, report)


def answer(number: int, n: int, serial: int = 0) -> Drawn:
    """Make the answer that a shard with CartPole-like transitions would send."""
    report = Report(1e8 * (1 + number % 7), np.inf, 10**9, 10**9, 0, 0, 1, serial)
    packed = [  # arrays of their own: pickle would send one that occurs twice only once
        (("state",), "float32", np.zeros((n, 4), np.float32)),
        (("next", "state"), "float32", np.zeros((n, 4), np.float32)),
        (("action",), "int32", np.zeros(n, np.int32)),
        (("reward",), "float32", np.zeros(n, np.float32)),
        (("next", "done"), "bool", np.zeros(n, bool)),
    ]
    return Drawn(report, packed, np.arange(n), np.arange(n), np.full(n, 0.1, np.float32))


def coordinator(batch: int, k: int, args: Args) -> dict:
    """The learner's own work for one batch over all shards, of k that were asked for together."""
    ledger = Ledger(args.shards)
    for shard in range(args.shards):
        ledger.note(shard, answer(shard, 0).report)
    batches = Batches(
        [],
        ledger,
        NoReplies(ledger),
        draw="independent",
        weight_normalization="batch",
        generator=torch.Generator().manual_seed(0),
        timeout_s=1.0,
        device=torch.device("cpu"),
        on_late=lambda: None,
    )
    generator = torch.Generator().manual_seed(0)
    totals = ledger.total.clone()

    def counts() -> list[list[int]]:
        spread = [counts_of(totals, batch, generator=generator) for _ in range(k)]
        return torch.stack(spread, 1).tolist()

    asked = [(shard, each) for shard, each in enumerate(counts()) if any(each)]
    answers = [(shard, answer(shard, sum(each)), each) for shard, each in asked]
    sent = [pickle.dumps(drawn, protocol=5) for _, drawn, _ in answers]

    def note() -> None:
        for shard, drawn, _ in answers:
            ledger.note(shard, drawn.report)

    def cut() -> list[list]:
        parts: list[list] = [[] for _ in range(k)]
        for shard, drawn, each in answers:
            deal(shard, drawn, each, parts)
        return parts

    parts = cut()
    work = {
        "counts_us": counts,
        "unpickle_us": lambda: [pickle.loads(each) for each in sent],
        "ledger_us": note,
        "cut_us": cut,
        "join_and_weigh_us": lambda: [batches._together(list(p), totals, 0.4) for p in parts],
    }
    us = {name: median_us(call, args.repeats) / k for name, call in work.items()}
    return {
        "batch": batch,
        "batches_per_request": k,
        "shards_asked": len(asked),
        **{name: round(each) for name, each in us.items()},
        "samples_per_s": round(batch / sum(us.values()) * 1e6),
        "bytes_per_sample": round(sum(map(len, sent)) / batch / k, 1),
    }


def messages(args: Args) -> dict:
    """Count the small calls of two actors that one process gets answered per second."""

    class Shard:
        def sample(self, n: int) -> int:
            return n

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        actors = [ray.remote(num_cpus=0)(Shard).remote() for _ in range(2)]
        ray.get([actor.sample.remote(0) for actor in actors])
        rates = []
        for _ in range(3):
            start = time.perf_counter()
            ray.get([actors[k % 2].sample.remote(k) for k in range(args.messages)])
            rates.append(args.messages / (time.perf_counter() - start))
        single = median_us(lambda: ray.get(actors[0].sample.remote(0)), 100, time.perf_counter)
    finally:
        ray.shutdown()
    return {"messages_per_s": round(statistics.median(rates)), "round_trip_us": round(single)}


def staleness(moved: float, args: Args) -> dict:
    """Bias and spread of a weighted mean where shards' masses moved by a factor exp(moved * z).

    Exact over the shards, whose transitions are alike within: one draw picks shard k with its stale
    share s_k, and its transitions' values f_k are averaged over all shards of N_k transitions.
    """
    generator = torch.Generator().manual_seed(1)
    shape = args.shards
    normal = torch.randn(4, shape, generator=generator, dtype=torch.float64)
    size = torch.exp(normal[0])  # shards of unequal size
    told = size * torch.exp(0.5 * normal[1])  # and unequal priorities
    now = told * torch.exp(moved * normal[2])
    share_of_n = size / size.sum()
    # TD errors: in proportion to the priorities, but for noise and for what has moved and will
    f = now / size * (now / told).sqrt() * torch.exp(0.3 * normal[3])
    mean = float((share_of_n * f).sum())

    def moments(drawn: torch.Tensor, believed: torch.Tensor) -> tuple[float, float]:
        """Relative bias of w f, and its relative standard deviation per draw."""
        wf = share_of_n / believed * f
        first, second = float((drawn * wf).sum()), float((drawn * wf**2).sum())
        return first / mean - 1, (second - first**2) ** 0.5 / mean

    stale, current = shares_of(told), shares_of(now)
    even = torch.full_like(size, 1 / shape)
    bias, spread = moments(stale, stale)
    return {
        "moved": moved,
        "bias_ours": abs(round(bias, 9)),
        "bias_if_totals_taken_as_current": round(moments(stale, current)[0], 4),
        "bias_even_with_local_weights": round(float((even * f).sum()) / mean - 1, 4),
        "spread_ours": round(spread, 3),
        "spread_with_current_totals": round(moments(current, current)[1], 3),
        "spread_uniform": round(moments(share_of_n, share_of_n)[1], 3),
    }


def page(results: dict) -> str:
    """Write the results in Markdown."""
    info = results["machine"]
    parts = [
        "# A thousand shards, on paper",
        f"`python -m benchmarks.studies.scale_simulation` on {info['cpu']}, {info['cores']} cores,"
        f" load before {info['load_before']}; {results['args']['shards']:,} shards.",
    ]
    for title in ("coordinator", "messages", "staleness"):
        body = [[f"{value:,}" for value in row.values()] for row in results[title]]
        parts += [f"## {title}", table([*results[title][0]], body)]
    return "\n\n".join(parts)


def published(results: dict) -> str:
    """Make the table of docs/scale.md: what k batches in a request leave of messages and work."""
    rate, body = results["messages"][0]["messages_per_s"], []
    for row in results["coordinator"]:
        batch, k, asked = (row[key] for key in ("batch", "batches_per_request", "shards_asked"))
        messages = 2 * asked / k  # a request and an update
        work = sum(value for name, value in row.items() if name.endswith("_us"))
        cells = (messages, work / 1000, row["samples_per_s"], batch * rate / messages)
        body.append([f"{batch:,}", k, f"{asked:,}", *map(number, cells)])
    head = [
        "batch",
        "k",
        "shards asked",
        "messages per batch",
        "learner's ms per batch",
        "samples/s of the learner",
        f"samples/s of {rate:,} messages/s",
    ]
    return table(head, body)


def main(args: Args) -> dict:
    """Measure, simulate, print, write."""
    torch.set_num_threads(1)
    results = {
        "args": asdict(args),
        **about(),
        "ray": ray.__version__,
        "coordinator": [
            coordinator(batch, k, args)
            for batch in (256, 1024, 4096, 65536)
            for k in map(int, args.requests.split(","))
        ],
        "messages": [messages(args)],
        "staleness": [staleness(moved, args) for moved in (0.0, 0.01, 0.1, 0.5, 1.0)],
    }
    save(args.out, results, page(results))
    if args.out == Args().out:
        fill(DOCS / "scale.md", published(results))
    return results


if __name__ == "__main__":
    main(parse_args(Args, __doc__.splitlines()[0]))
