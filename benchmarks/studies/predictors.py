"""Do diagnostics say which runs gain from prioritized replay?

    python -m benchmarks.studies.predictors --jobs 2   # what has no file yet, then the report
    python -m benchmarks.studies.predictors --report --page docs/diagnostics.md

A run's gain is the share of the uniform runs of the same task that it beats later, ties counting
half. The diagnostics are those of its buffer before that. Rank correlations are taken over all
runs of all settings, and within each setting, where only chance tells the runs apart.

Blind Cliffwalk (n = 8, the settings of its ablation) and CartPole (all prioritized agents, 4,200
steps) are run here. MinAtar's runs are read from the files of their study, as many as there are.
"""

import argparse
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from benchmarks.pages import RESULTS, fill, table
from benchmarks.studies.statistics_of_runs import LEVEL

KEYS = {
    "effective_share": "effective sample size / size",
    "top_1_percent_share": "share of the draws of the top 1%",
    "never_replayed_share": "share never replayed",
    "weight/q01": "weight, 1% quantile",
    "weight/q25": "weight, 25% quantile",
    "weight/q50": "weight, median",
}
"""The diagnostics looked at, and their names in the table."""

CLIFFWALK = {"n": 8, "seeds": 21, "at": 400, "limit": 20_000}
CARTPOLE = {"steps": 4_200, "runs": 100, "at": 2_000, "window": (2_000, 4_000)}
MINATAR_AT = 0.25  # of a run's frames; the returns compared are those of its second half
REPETITIONS = 2_000


@dataclass(frozen=True)
class Setting:
    """S prioritized runs of one setting.

    Attributes:
        study: "Blind Cliffwalk", "CartPole" or "MinAtar".
        name: of the setting.
        gain: share of the uniform runs that each run beats, [S].
        figures: diagnostics of each run, by key, [S].
    """

    study: str
    name: str
    gain: NDArray
    figures: dict[str, NDArray]

    @cached_property
    def alone(self) -> dict[str, float]:
        """Rank correlation of each diagnostic with the gain among these runs; NaN if all equal."""
        return {key: spearman(values, self.gain) for key, values in self.figures.items()}


def gains(scores: NDArray, uniform: NDArray) -> NDArray:
    """Share of the uniform runs [R] that each run [S] beats; ties count half."""
    return ((scores[:, None] > uniform) + 0.5 * (scores[:, None] == uniform)).mean(1)


class Watch:
    """The diagnostics of a buffer at one step."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self, step: int, buffer: Any) -> None:
        """Look if it is time."""
        if step == self.at:
            found = buffer.diagnostics()
            self.found = {key: found[key].clone() for key in KEYS}


def cliffwalk(settings: dict[str, Any]) -> dict[str, NDArray]:
    """Blind Cliffwalk with one setting: minus the updates needed, [S], and diagnostics."""
    from benchmarks.studies.blind_cliffwalk.agents import Problem, prioritized

    updates, lines = [], []
    for seed in range(CLIFFWALK["seeds"]):
        problem_rng, draw_rng = np.random.default_rng([seed, CLIFFWALK["n"]]).spawn(2)
        problem = Problem.of(CLIFFWALK["n"], "tabular", problem_rng)
        watch = Watch(CLIFFWALK["at"])
        limit = CLIFFWALK["limit"]
        taken = prioritized(problem, draw_rng, limit, watch=watch, track_draws=True, **settings)
        updates.append(-np.inf if taken is None else -float(taken))
        lines.append({key: value.item() for key, value in watch.found.items()})
    figures = {key: np.array([line.get(key, np.nan) for line in lines]) for key in KEYS}
    return {"score": np.array(updates)} | figures


def cliffwalk_uniform(batch: int) -> NDArray:
    """Minus the updates of uniform replay, [S], from the study's results."""
    import json

    results = json.loads((RESULTS / "blind_cliffwalk.json").read_text())
    for record in results["ablation"]["records"]:
        wanted = record["agent"] == "uniform" and record["n"] == CLIFFWALK["n"]
        if wanted and record["batch"] == batch:
            return -np.array(record["updates"], float)
    raise SystemExit("expected results of the Blind Cliffwalk's ablation: run it first")


def cartpole(variant: str, agent: str) -> dict[str, NDArray]:
    """CartPole with one agent: mean return of the window, [S], and diagnostics."""
    from benchmarks.studies.cartpole.results import Record, at_steps
    from benchmarks.studies.cartpole.settings import VARIANTS
    from benchmarks.studies.cartpole.training import train

    torch.set_flush_denormal(True)
    about, watch = VARIANTS[variant], Watch(CARTPOLE["at"])
    settings = replace(about.settings, steps=CARTPOLE["steps"], evaluate_every=10**9)
    outcome = train(
        settings, about.agents[agent], runs=CARTPOLE["runs"], seed=0,
        name=f"{variant}/{agent}", watch=watch,
    )  # fmt: skip
    record = Record(outcome.lengths, outcome.greedy, outcome.steps, {"settings": {"task": ""}})
    # a run's own steps are fewer than the lockstep's: resets are none
    record = replace(record, steps=np.full(CARTPOLE["runs"], CARTPOLE["window"][1]))
    figures = {key: value.numpy() for key, value in watch.found.items()}
    return {"score": at_steps(record, *CARTPOLE["window"])} | figures


def cartpole_uniform(variant: str) -> NDArray:
    """Mean returns of uniform replay in the same window, [R], from the study's results."""
    from benchmarks.studies.cartpole.results import at_steps, load, path

    record = load(path(RESULTS / "cartpole_study", variant, "uniform"))
    return at_steps(record, *CARTPOLE["window"])


def minatar() -> Iterator[Setting]:
    """The prioritized agents of the MinAtar study beside the uniform one of the same learner."""
    from benchmarks.studies.minatar.report import read
    from benchmarks.studies.minatar.settings import ARMS

    for game, arms in read(RESULTS / "minatar_study").items():
        for arm, runs in arms.items():
            same = [
                other
                for other in arms
                if ARMS[other].replay["alpha"] == 0
                and (ARMS[other].lr, ARMS[other].n_step) == (ARMS[arm].lr, ARMS[arm].n_step)
            ]
            if ARMS[arm].replay["alpha"] == 0 or not same:
                continue
            frames = runs.about["settings"]["frames"]
            later = partial(_later, frames=frames)
            at = round(MINATAR_AT * frames / runs.about["settings"]["diagnose_every"]) - 1
            figures = {key: runs.diagnostics[key][:, at] for key in KEYS}
            gain = gains(later(runs), later(arms[same[0]]))
            yield Setting("MinAtar", f"{game}, {arm}", gain, figures)


def _later(runs: Any, frames: int) -> NDArray:
    return runs.mean_return(frames // 2, frames)


def tasks() -> dict[tuple[str, str], tuple[Callable[[], dict[str, NDArray]], Callable]]:
    """What is run here: (study, setting) -> the runs, and the scores of the uniform ones."""
    from benchmarks.studies.blind_cliffwalk.__main__ import VARIED
    from benchmarks.studies.cartpole.settings import VARIANTS

    found: dict[tuple[str, str], Any] = {}
    for settings in (one for section in VARIED.values() for one in section):
        if settings.get("alpha") == 0:
            continue
        name = ", ".join(f"{key} {value}" for key, value in settings.items())
        uniform = partial(cliffwalk_uniform, settings.get("batch", 1))
        found["Blind Cliffwalk", name] = partial(cliffwalk, settings), uniform
    for variant, about in VARIANTS.items():
        if about.settings.task != "CartPole-v1":
            continue
        for agent, replay in about.agents.items():
            if replay.alpha:
                run = partial(cartpole, variant, agent)
                found["CartPole", f"{variant}, {agent}"] = run, partial(cartpole_uniform, variant)
    return found


def file_of(out: Path, key: tuple[str, str]) -> Path:
    """The file of the runs of a setting."""
    return out / ("".join(c if c.isalnum() else "-" for c in ".".join(key).lower()) + ".npz")


def work(key: tuple[str, str], out: Path) -> str:
    """Run a setting, unless its file is there; a line about it."""
    file = file_of(out, key)
    if file.exists():
        return f"{file.name}: there already"
    torch.set_num_threads(1)
    found = tasks()[key][0]()
    out.mkdir(parents=True, exist_ok=True)
    partial_file = file.with_suffix(".partial")
    with partial_file.open("wb") as stream:
        np.savez_compressed(stream, **{k.replace("/", "."): v for k, v in found.items()})
    os.replace(partial_file, file)
    return f"{file.name}: done"


def read(out: Path) -> list[Setting]:
    """All settings that have files."""
    found = []
    for key, (_, uniform) in tasks().items():
        file = file_of(out, key)
        if not file.exists():
            continue
        with np.load(file) as data:
            figures = {name: data[name.replace("/", ".")] for name in KEYS}
            score = data["score"]
        other = uniform()
        known = ~np.isnan(score)
        gain = gains(score[known], other[~np.isnan(other)])
        figures = {name: values[known] for name, values in figures.items()}
        found.append(Setting(*key, gain, figures))
    return found + list(minatar())


def spearman(x: NDArray, y: NDArray) -> float:
    """Rank correlation; NaN if all of x or all of y are equal."""
    x, y = rankdata(x), rankdata(y)
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / scale) if scale > 0 else np.nan


def across(settings: list[Setting], key: str) -> float:
    """Rank correlation over all runs of all settings."""
    x = np.concatenate([one.figures[key] for one in settings])
    y = np.concatenate([one.gain for one in settings])
    known = ~np.isnan(x)
    return spearman(x[known], y[known]) if known.sum() > 2 else np.nan


def within(settings: list[Setting], key: str) -> float:
    """Mean over settings of the rank correlation among its runs; NaN for one or two settings."""
    found = [one.alone[key] for one in settings]
    return float(np.nanmean(found)) if np.isfinite(found).sum() > 2 else np.nan


def with_interval(
    settings: list[Setting], statistic: Callable[[list[Setting], str], float], key: str
) -> tuple[float, float, float]:
    """A statistic and its interval: settings are drawn again, within each study."""
    random = np.random.default_rng(0)
    studies = [[s for s in settings if s.study == name] for name in _studies(settings)]
    found = []
    for _ in range(REPETITIONS):
        drawn = [
            group[i] for group in studies for i in random.integers(len(group), size=len(group))
        ]
        found.append(statistic(drawn, key))
    low, high = np.nanquantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return statistic(settings, key), float(low), float(high)


def _studies(settings: list[Setting]) -> list[str]:
    return list(dict.fromkeys(one.study for one in settings))


def _cell(found: tuple[float, float, float]) -> str:
    return "" if np.isnan(found[0]) else "{:.2f} [{:.2f}, {:.2f}]".format(*found)


def report(settings: list[Setting]) -> str:
    """Make the tables."""
    counts = [
        f"{study}: {len(found)} settings, {sum(len(one.gain) for one in found)} runs"
        for study in _studies(settings)
        if (found := [one for one in settings if one.study == study])
    ]
    parts = [f"{'; '.join(counts)}."]
    groups = {study: [s for s in settings if s.study == study] for study in _studies(settings)}
    groups |= {"all": settings}
    for title, statistic in (("Between settings", across), ("Within a setting", within)):
        body = [
            [name, *(_cell(with_interval(group, statistic, key)) for group in groups.values())]
            for key, name in KEYS.items()
        ]
        parts.append(f"**{title}**\n\n{table(['diagnostic', *groups], body)}")
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Run what has no file yet, then report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.studies.predictors")
    parser.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--report", action="store_true", help="only the tables")
    parser.add_argument("--page", type=Path, help="fill the marked block of this page")
    parser.add_argument("--out", type=Path, default=RESULTS / "predictors", help="the files")
    args = parser.parse_args(argv)
    if not args.report:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(args.jobs, mp_context=context) as pool:
            for line in pool.map(partial(work, out=args.out), tasks()):
                print(line, flush=True)
    text = report(read(args.out))
    print(text)
    if args.page is not None:
        fill(args.page, text)


if __name__ == "__main__":
    main()
