"""Blind Cliffwalk: how many updates Q-learning needs, by the order in which it replays.

The study of Schaul et al. 2015 (arXiv 1511.05952), section 3 and appendix B.1. In each of n states
one action is right and leads on; the wrong one ends the episode. Only n right actions in a row are
rewarded, with 1. The memory holds what all 2^n sequences of actions bring about, and the agents
differ only in which transition they learn from next; proportional and rank-based draws are those of
`per_td.PrioritizedReplayBuffer`. docs/blind_cliffwalk.md says what came out.

    python -m benchmarks.blind_cliffwalk --publish
    python -m benchmarks.blind_cliffwalk --ablation --max-states 10
    python -m benchmarks.blind_cliffwalk --ablation --seeds 7 --cap 0.3 --publish
"""

import argparse
import heapq
import inspect
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.random import Generator

from benchmarks.blind_cliffwalk_report import (
    Count,
    Record,
    ablation_tables,
    finite,
    median,
    plot,
    publish,
    study_tables,
)
from benchmarks.machine import machine, versions
from per_td import PrioritizedReplayBuffer

STEP_SIZE = 0.25
TOLERANCE = 1e-3  # mean squared error over all state-action values at which an agent is done
CHUNK = 1 << 14  # how many draws the compiled agents are handed at once
GIVE_UP_AFTER = 3  # seeds that all failed: the others are not tried
ORACLE_CAP = 1.0  # `Args.cap` of the oracle, which either is fast or does not arrive
RANK_EXISTS = "prioritization" in inspect.signature(PrioritizedReplayBuffer).parameters
PLAIN = {"alpha": 0.6, "beta": 0.0, "eps": 1e-6}  # as in the paper's study: no weights


def option(default: Any, text: str) -> Any:
    """A field of `Args` with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Args:
    """What to run."""

    max_states: int = option(16, "largest n; all even n from 2 on are run")
    seeds: int = option(21, "initial parameters, orders of the memory and random draws")
    cap: float = option(10.0, "updates an agent may take, in medians of the uniform one")
    agents: str = option("", "only these, separated by commas; the uniform one runs in any case")
    ablation: bool = option(False, "vary the settings of proportional replay instead")
    quick: bool = option(False, "n up to 6 and 3 seeds, to see that it runs; nothing is kept")
    json: str = option("benchmarks/results/blind_cliffwalk.json", "results, added to what is there")
    plot: str = option("benchmarks/results/blind_cliffwalk.png", "the picture")
    publish: bool = option(False, "put the tables into the pages under docs/")


@dataclass(frozen=True)
class Problem:
    """A cliff walk to be learned from its memory.

    A transition is known by its `pair`, 2 * state + action, since nothing here is random.

    Attributes:
        memory: pairs of all transitions, int64 [2^(n+1) - 2].
        true: values of all states and actions, float64 [n, 2].
        theta: initial parameters, float64 [n + 1, 2]: one per state and action, and biases.
        feature: what the biases are multiplied by: 0.0 (tabular) or 1.0 (linear).
    """

    memory: np.ndarray
    true: np.ndarray
    theta: np.ndarray
    feature: float

    @classmethod
    def of(cls, n: int, representation: str, rng: Generator) -> "Problem":
        """With random initial parameters, N(0, 0.1), and the memory in random order."""
        theta = rng.normal(0.0, 0.1, (n + 1, 2))
        memory = rng.permutation(all_transitions(n))
        return cls(memory, true_values(n), theta, float(representation == "linear"))


def all_transitions(n: int) -> np.ndarray:
    """Pairs of the transitions of all 2^n sequences of n actions, each until its episode ends.

    State s is reached by 2^(n-s) sequences, of which half go right there: 2^(n-s-1) copies of
    either action, together 2^(n+1) - 2.
    """
    return np.repeat(np.arange(2 * n), 2 ** (n - 1 - np.arange(2 * n) // 2))


def true_values(n: int) -> np.ndarray:
    """Optimal values, float64 [n, 2]: gamma^(actions still to go after it) if right, 0 if wrong."""
    values = np.zeros((n, 2))
    state = np.arange(n)
    values[state, state % 2] = (1 - 1 / n) ** (n - 1 - state)
    return values


@njit(cache=True)
def td_error(theta: np.ndarray, feature: float, pair: int) -> float:
    """Before a step: reward + gamma max_a Q(s', a) - Q(s, a), gamma = 1 - 1/n.

    Action s % 2 is right in state s: it alternates, so that a bias per action cannot tell.
    """
    n = len(theta) - 1
    state, action = pair >> 1, pair & 1
    target = 0.0
    if action == state & 1:
        target = 1.0
        if state < n - 1:
            target = (1 - 1 / n) * (theta[state + 1] + feature * theta[n]).max()
    return target - theta[state, action] - feature * theta[n, action]


@njit(cache=True)
def update(
    theta: np.ndarray,
    feature: float,
    true: np.ndarray,
    pairs: np.ndarray,
    weights: np.ndarray,
    delta: np.ndarray,
) -> float:
    """One step of Q-learning on the mean of a batch, in place.

    Args:
        theta, feature, true: as in `Problem`.
        pairs, weights: what to learn from and how much each counts, [B].
        delta: takes the TD errors before the step, [B].

    Returns:
        Mean squared error of all values after it.
    """
    n, size = len(true), len(pairs)
    for i in range(size):
        delta[i] = td_error(theta, feature, pairs[i])
    for i in range(size):
        state, action = pairs[i] >> 1, pairs[i] & 1
        step = STEP_SIZE * weights[i] * delta[i] / size
        theta[state, action] += step
        theta[n, action] += step * feature
    return ((theta[:n] + feature * theta[n] - true) ** 2).mean()


@njit(cache=True)
def best_pair(theta: np.ndarray, feature: float, true: np.ndarray) -> int:
    """The transition after which the error is least: copies of one pair are all the same."""
    pair, delta = np.zeros(1, np.int64), np.empty(1)
    best, least = 0, np.inf
    for pair[0] in range(true.size):
        error = update(theta.copy(), feature, true, pair, np.ones(1), delta)
        if error < least:
            best, least = pair[0], error
    return best


@njit(cache=True)
def follow(theta: np.ndarray, feature: float, true: np.ndarray, pairs: np.ndarray) -> int:
    """Learn from `pairs`, [steps, B], -1 asking the oracle; updates until done, or -1 if not."""
    weights, delta = np.ones(pairs.shape[1]), np.empty(pairs.shape[1])
    for step in range(len(pairs)):
        if pairs[step, 0] < 0:
            pairs[step, 0] = best_pair(theta, feature, true)
        if update(theta, feature, true, pairs[step], weights, delta) < TOLERANCE:
            return step + 1
    return -1


@njit(cache=True)
def follow_largest(
    theta: np.ndarray, feature: float, true: np.ndarray, memory: np.ndarray, limit: int
) -> int:
    """Learn from the transition with the largest |TD error| when last seen, 1 if not yet seen."""
    heap = [(-1.0, slot) for slot in range(len(memory))]  # sorted is a heap: ties by slot
    weights, delta = np.ones(1), np.empty(1)
    for step in range(limit):
        slot = heap[0][1]
        error = update(theta, feature, true, memory[slot : slot + 1], weights, delta)
        if error < TOLERANCE:
            return step + 1
        heapq.heapreplace(heap, (-abs(delta[0]), slot))
    return -1


Agent = Callable[[Problem, Generator, int], Count]
"""How many updates it took until the values were right; None: not within the limit."""


def scripted(
    problem: Problem, rng: Generator, limit: int, *, batch: int = 1, oracle: float = 0.0
) -> Count:
    """Uniform draws, a share `oracle` of which the oracle replaces by the best there is."""
    theta = problem.theta.copy()
    for start in range(0, limit, CHUNK):
        shape = min(CHUNK, limit - start), batch
        pairs = problem.memory[rng.integers(len(problem.memory), size=shape)]
        if oracle:
            pairs[rng.random(len(pairs)) < oracle] = -1
        taken = follow(theta, problem.feature, problem.true, pairs)
        if taken > 0:
            return start + taken
    return None


def greedy(problem: Problem, rng: Generator, limit: int) -> Count:
    """Always the largest TD error: nothing is drawn."""
    theta = problem.theta.copy()
    taken = follow_largest(theta, problem.feature, problem.true, problem.memory, limit)
    return taken if taken > 0 else None


def prioritized(
    problem: Problem,
    rng: Generator,
    limit: int,
    *,
    batch: int = 1,
    initial: float | None = None,
    **settings: Any,
) -> Count:
    """Draws, weights and priorities of per_td's buffer; `initial` None leaves those to it too."""
    pairs = torch.from_numpy(problem.memory)
    generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
    buffer = PrioritizedReplayBuffer(
        len(pairs), method="tree", generator=generator, **(PLAIN | settings)
    )
    given = None if initial is None else torch.full((len(pairs),), initial)
    buffer.extend_leaves({("pair",): pairs}, given)
    theta, delta = problem.theta.copy(), torch.empty(batch, dtype=torch.float64)
    for step in range(limit):
        leaves, index, weight = buffer.sample_leaves(batch)
        drawn = leaves["pair",].numpy(), weight.numpy()
        error = update(theta, problem.feature, problem.true, *drawn, delta.numpy())
        if error < TOLERANCE:
            return step + 1
        if not error < 1e6:  # it has diverged
            return None
        buffer.update_priority(index, delta)
    return None


AGENTS: dict[str, Agent] = {
    "uniform": scripted,
    "oracle": partial(scripted, oracle=1.0),
    "oracle, 10% random": partial(scripted, oracle=0.9),
    "greedy TD error": greedy,
    "proportional": prioritized,
    "rank-based": partial(prioritized, alpha=0.7, prioritization="rank"),
}
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


def study(args: Args) -> Iterator[Record]:
    """Every agent on every size, in both representations."""
    chosen = [name.strip() for name in args.agents.split(",") if name.strip()] or list(AGENTS)
    for representation in ("tabular", "linear"):
        for n in range(2, args.max_states + 1, 2):
            uniform = baseline(n, args.seeds, representation=representation)
            yield uniform
            for name in chosen:
                if name == "uniform" or (name == "rank-based" and not RANK_EXISTS):
                    continue
                cap = ORACLE_CAP if "oracle" in name else args.cap
                yield measure(
                    AGENTS[name],
                    n,
                    args.seeds,
                    int(cap * median(uniform["updates"])),
                    representation=representation,
                    agent=name,
                )


def ablation(args: Args) -> Iterator[Record]:
    """Proportional replay with one setting changed at a time, tabular, at the largest n."""
    n = args.max_states
    uniform = {size: baseline(n, args.seeds, batch=size) for size in (1, BATCH)}
    yield from uniform.values()
    for section, variants in VARIED.items():
        for settings in variants:
            size = settings.get("batch", 1)
            limit = int(args.cap * median(uniform[size]["updates"]))
            agent = partial(prioritized, **settings)
            name = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "batch")
            labels = {"section": section, "agent": name or "as they are", "batch": size}
            yield measure(agent, n, args.seeds, limit, **labels)


def about(args: Args, seconds: float) -> Record:
    """Where and how the figures were made."""
    return {"args": asdict(args), "seconds": seconds, "machine": machine(), "versions": versions()}


def merge(path: Path, name: str, run: Record) -> Record:
    """Put a run into a file of results: its records replace those of the same kind."""
    results = json.loads(path.read_text()) if path.exists() else {}
    keys = ("representation", "section", "agent", "n", "batch")
    known = {tuple(r.get(k) for k in keys): r for r in results.get(name, run)["records"]}
    known |= {tuple(r.get(k) for k in keys): r for r in run["records"]}
    results[name] = {"about": run["about"], "records": list(known.values())}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results) + "\n")
    return results


def arguments(argv: list[str] | None = None) -> Args:
    """The command line, with the fields' defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for one in fields(Args):
        kind = {"action": "store_true"} if one.default is False else {"type": type(one.default)}
        name = f"--{one.name.replace('_', '-')}"
        parser.add_argument(name, default=one.default, help=one.metadata["help"], **kind)
    return Args(**vars(parser.parse_args(argv)))


def main(argv: list[str] | None = None) -> None:
    """Run the study or the ablation, print its tables, keep the results."""
    args = arguments(argv)
    if args.quick:
        small = {"max_states": min(args.max_states, 6), "seeds": min(args.seeds, 3)}
        args = replace(args, **small, json="", plot="", publish=False)
    torch.set_num_threads(1)
    name = "ablation" if args.ablation else "study"
    start = time.perf_counter()
    records = list((ablation if args.ablation else study)(args))
    run = {"about": about(args, time.perf_counter() - start), "records": records}
    results = merge(Path(args.json), name, run) if args.json else {name: run}
    records = results[name]["records"]
    text = "\n\n".join((ablation_tables if args.ablation else study_tables)(records))
    print(text)
    if args.plot and not args.ablation:
        plot(records, Path(args.plot))
    if args.publish:
        publish(name, text)


if __name__ == "__main__":
    main()
