"""Blind Cliffwalk: how many updates Q-learning needs, by the order in which it replays.

The study of Schaul et al. 2015 (arXiv 1511.05952), section 3 and appendix B.1. In each of n states
one action is right and leads on; the wrong one ends the episode. Only n right actions in a row are
rewarded, with 1. The memory holds what all 2^n sequences of actions bring about, and the agents
differ only in which transition they learn from next; proportional and rank-based draws are those of
`per_td.PrioritizedReplayBuffer`. docs/blind_cliffwalk.md says what came out.

    python -m benchmarks.studies.blind_cliffwalk --publish
    python -m benchmarks.studies.blind_cliffwalk --ablation --max-states 8 --publish
    python -m benchmarks.studies.blind_cliffwalk --ablation --seeds 7 --cap 0.3 --publish
"""

import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import option, parse_args
from benchmarks.machine import machine, versions
from benchmarks.pages import fill
from benchmarks.studies.blind_cliffwalk.agents import (
    AGENTS,
    Agent,
    Problem,
    prioritized,
    scripted,
)
from benchmarks.studies.blind_cliffwalk.report import (
    PAGES,
    Count,
    Record,
    finite,
    median,
    page_block,
    plot,
)

GIVE_UP_AFTER = 3  # seeds that all failed: the others are not tried
ORACLE_LIMIT = 100_000  # updates of the oracles, which either are fast or do not arrive


@dataclass(frozen=True)
class Args:
    """The settings of a run; each is a command-line option too."""

    max_states: int = option(16, "largest n; all even n from 2 on are run")
    seeds: int = option(21, "initial parameters, orders of the memory and random draws")
    cap: float = option(10.0, "updates an agent may take, in medians of the uniform one")
    agents: str = option("", "only these, separated by commas; the uniform one runs in any case")
    sections: str = option("", "of the ablation, only these, separated by commas")
    ablation: bool = option(False, "vary the settings of proportional replay instead")
    quick: bool = option(False, "n up to 6 and 3 seeds, to see that it runs; nothing is kept")
    json: str = option("benchmarks/results/blind_cliffwalk.json", "results, added to what is there")
    plot: str = option("benchmarks/results/blind_cliffwalk.png", "the picture")
    publish: bool = option(False, "put the tables into the pages under docs/")


BATCH = 16
VARIED: dict[str, list[dict[str, Any]]] = {
    "alpha": [{"alpha": value} for value in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)],
    "eps": [{"eps": value} for value in (1e-6, 1e-4, 1e-3, 1e-2)],
    "initial priority": [{"initial": value} for value in (1e-8, 0.01, 1.0, 1000.0)],
    "weights": [
        {"beta": beta, "weight_normalization": way}
        for way in ("buffer", "none")
        for beta in (0.4, 1.0)
    ],
    f"batch of {BATCH}": [
        {"batch": BATCH},
        {"batch": BATCH, "draw": "stratified"},
        *(
            {"batch": BATCH, "beta": beta, "weight_normalization": way}
            for way in ("batch", "buffer", "none")
            for beta in (0.4, 1.0)
        ),
    ],
}


def measure(
    run: Agent, n: int, seeds: int, limit: int, *, representation: str = "tabular", **labels: Any
) -> Record:
    """Run an agent on all seeds: a record with its counts, one per seed tried."""
    updates: list[Count] = []
    start = time.perf_counter()
    for seed in range(seeds):
        problem_rng, draw_rng = np.random.default_rng([seed, n]).spawn(2)
        updates.append(run(Problem.of(n, representation, problem_rng), draw_rng, limit))
        if len(updates) == GIVE_UP_AFTER and not any(updates):
            break
    where = {"representation": representation, "n": n, "limit": limit}
    record = labels | where | {"updates": updates, "seconds": time.perf_counter() - start}
    print({**record, "updates": finite(median(updates))}, flush=True)
    return record


def baseline(n: int, seeds: int, **given: Any) -> Record:
    """The uniform agent's record; its limit is far beyond what it takes."""
    agent = partial(scripted, batch=given.get("batch", 1))
    return measure(agent, n, seeds, 100 * 2 ** (n + 1), agent="uniform", **given)


def only(wanted: str, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list, all that there are if it is empty."""
    names = [name.strip() for name in wanted.split(",")] if wanted else list(known)
    unknown = set(names) - set(known)
    if unknown:
        raise SystemExit(f"expected some of {', '.join(known)}, got {', '.join(unknown)}")
    return names


def study(args: Args) -> Iterator[Record]:
    """Every agent on every size, in both representations."""
    chosen = only(args.agents, AGENTS)
    for representation in ("tabular", "linear"):
        for n in range(2, args.max_states + 1, 2):
            uniform = baseline(n, args.seeds, representation=representation)
            yield uniform
            for name in chosen:
                if name == "uniform":
                    continue
                limit = int(args.cap * median(uniform["updates"]))
                yield measure(
                    AGENTS[name],
                    n,
                    args.seeds,
                    min(limit, ORACLE_LIMIT) if "oracle" in name else limit,
                    representation=representation,
                    agent=name,
                )


def ablation(args: Args) -> Iterator[Record]:
    """Proportional replay with one setting changed at a time, tabular, at the largest n."""
    n = args.max_states
    uniform = {size: baseline(n, args.seeds, batch=size) for size in (1, BATCH)}
    yield from uniform.values()
    for section in only(args.sections, VARIED):
        for settings in VARIED[section]:
            size = settings.get("batch", 1)
            limit = int(args.cap * median(uniform[size]["updates"]))
            agent = partial(prioritized, **settings)
            name = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "batch")
            labels = {"section": section, "agent": name or "as they are", "batch": size}
            yield measure(agent, n, args.seeds, limit, **labels)


def about(args: Args, seconds: float) -> Record:
    """Tell where the figures were made, and with which arguments."""
    return {"args": asdict(args), "seconds": seconds, "machine": machine(), "versions": versions()}


def merge(path: Path, name: str, run: Record) -> Record:
    """Put a run into a file of results: its records replace those of the same kind."""
    results = json.loads(path.read_text()) if path.exists() else {}
    old = results.get(name, {"runs": [], "records": []})
    keys = ("representation", "section", "agent", "n", "batch")
    records = {tuple(r.get(k) for k in keys): r for r in (*old["records"], *run["records"])}
    runs = [known for known in old["runs"] if known["args"] != run["runs"][0]["args"]]
    results[name] = {"runs": runs + run["runs"], "records": list(records.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")
    return results


def main(argv: list[str] | None = None) -> None:
    """Run the study or the ablation, print its tables, keep the results."""
    args = parse_args(Args, __doc__, argv)
    if args.quick:
        small = {"max_states": min(args.max_states, 6), "seeds": min(args.seeds, 3)}
        args = replace(args, **small, json="", plot="", publish=False)
    torch.set_num_threads(1)
    name = "ablation" if args.ablation else "study"
    start = time.perf_counter()
    records = list((ablation if args.ablation else study)(args))
    run = {"runs": [about(args, time.perf_counter() - start)], "records": records}
    results = merge(Path(args.json), name, run) if args.json else {name: run}
    records, text = results[name]["records"], page_block(name, results[name])
    print(text)
    if args.plot and not args.ablation:
        plot(records, Path(args.plot))
    if args.publish:
        fill(PAGES[name], text)


if __name__ == "__main__":
    main()
