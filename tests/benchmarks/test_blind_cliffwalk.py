import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.studies.blind_cliffwalk import __main__ as cliffwalk
from benchmarks.studies.blind_cliffwalk import agents, report

ROOT = Path(__file__).parents[2]
REPRESENTATIONS = ("tabular", "linear")
ALWAYS_ARRIVE = [name for name in agents.AGENTS if name != "oracle"]


def outcome(n, state, action):
    """Reward and next state, None where the episode ends: the environment, in plain words."""
    if action != state % 2:
        return 0.0, None
    return (1.0, None) if state == n - 1 else (0.0, state + 1)


def value(theta, feature, state, action):
    return theta[state][action] + feature * theta[-1][action]


def naive_td_error(n, theta, feature, pair):
    state, action = divmod(pair, 2)
    reward, following = outcome(n, state, action)
    if following is not None:
        reward += (1 - 1 / n) * max(value(theta, feature, following, a) for a in (0, 1))
    return reward - value(theta, feature, state, action)


def naive_update(n, theta, feature, pairs, weights):
    """New parameters, TD errors and mean squared error, by loops alone."""
    delta = [naive_td_error(n, theta, feature, pair) for pair in pairs]
    new = [list(row) for row in theta]
    for pair, weight, error in zip(pairs, weights, delta, strict=True):
        state, action = divmod(pair, 2)
        new[state][action] += 0.25 * weight * error / len(pairs)
        new[n][action] += 0.25 * weight * error / len(pairs) * feature
    true = agents.true_values(n)
    errors = [
        (value(new, feature, state, action) - true[state, action]) ** 2
        for state in range(n)
        for action in (0, 1)
    ]
    return new, delta, sum(errors) / len(errors)


def problem(n, representation="tabular", seed=0):
    return agents.Problem.of(n, representation, np.random.default_rng(seed))


def median_updates(name, n, seeds, limit=20_000, representation="tabular"):
    agent = agents.AGENTS[name]
    record = cliffwalk.measure(agent, n, seeds, limit, representation=representation, agent=name)
    return report.median(record["updates"])


@pytest.mark.parametrize("n", range(1, 9))
def test_memory_holds_every_transition_of_every_sequence_of_actions(n):
    lived = Counter()
    for actions in itertools.product((0, 1), repeat=n):
        state = 0
        for action in actions:
            lived[2 * state + action] += 1
            _, state = outcome(n, state, action)
            if state is None:
                break
    memory = problem(n).memory
    assert len(memory) == 2 ** (n + 1) - 2
    assert Counter(memory.tolist()) == lived
    assert lived[2 * (n - 1) + (n - 1) % 2] == 1  # one success only


@pytest.mark.parametrize("n", [2, 3, 7, 16])
def test_true_values_solve_the_bellman_equation(n):
    true = agents.true_values(n)
    for state, action in itertools.product(range(n), (0, 1)):
        reward, following = outcome(n, state, action)
        target = reward + (0.0 if following is None else (1 - 1 / n) * true[following].max())
        assert true[state, action] == pytest.approx(target)


@pytest.mark.parametrize("feature", [0.0, 1.0])
def test_update_is_that_of_the_naive_loops(feature):
    rng = np.random.default_rng(3)
    for n in (2, 3, 8):
        true, delta = agents.true_values(n), np.empty(5)
        theta, pairs = rng.normal(size=(n + 1, 2)), rng.integers(2 * n, size=5)
        pairs[1] = pairs[0]
        weights = rng.random(5)
        new, errors, mse = naive_update(
            n, theta.tolist(), feature, pairs.tolist(), weights.tolist()
        )
        found = agents.update(theta, feature, true, pairs, weights, delta)
        np.testing.assert_allclose(theta, new, rtol=1e-12)
        np.testing.assert_allclose(delta, errors, rtol=1e-12)
        assert found == pytest.approx(mse, rel=1e-12)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_oracle_picks_what_lowers_the_error_most(representation):
    for seed in range(5):
        one = problem(5, representation, seed)
        theta, feature = one.theta.tolist(), one.feature
        errors = [naive_update(5, theta, feature, [pair], [1.0])[2] for pair in range(10)]
        assert agents.best_pair(one.theta, feature, one.true) == np.argmin(errors)


@pytest.mark.parametrize("representation", REPRESENTATIONS)
def test_greedy_agent_follows_the_largest_td_error_last_seen(representation):
    one = problem(5, representation)
    theta, stored = one.theta.tolist(), [1.0] * len(one.memory)
    updates, mse = 0, 1.0
    while mse >= 1e-3:
        slot = max(range(len(stored)), key=lambda i: (stored[i], -i))
        theta, delta, mse = naive_update(5, theta, one.feature, [int(one.memory[slot])], [1.0])
        stored[slot] = abs(delta[0])
        updates += 1
    assert agents.greedy(one, np.random.default_rng(0), 5000) == updates


@pytest.mark.parametrize("representation", REPRESENTATIONS)
@pytest.mark.parametrize("name", ALWAYS_ARRIVE)
def test_every_agent_arrives(name, representation):
    for n in (2, 3, 6):
        assert np.isfinite(median_updates(name, n, 3, representation=representation))


def test_order_of_the_agents_at_eight_states():
    counts = {name: median_updates(name, 8, 11) for name in ALWAYS_ARRIVE}
    assert 4_000 < counts["uniform"] < 12_000
    assert counts["proportional"] < 0.35 * counts["uniform"]
    assert counts["greedy TD error"] < counts["proportional"]
    assert median_updates("oracle", 8, 11) < min(480, counts["greedy TD error"])


@pytest.mark.slow
def test_rank_based_replay_beats_uniform_replay_at_eight_states():
    assert median_updates("rank-based", 8, 11) < 0.45 * median_updates("uniform", 8, 11)


@pytest.mark.slow
def test_alpha_zero_is_no_faster_than_uniform_replay():
    agent = partial(agents.prioritized, alpha=0.0)
    flat = cliffwalk.measure(agent, 6, 11, 20_000, agent="alpha 0")["updates"]
    assert 0.6 < report.median(flat) / median_updates("uniform", 6, 11) < 1.6


def test_limit_is_kept_and_hopeless_settings_are_given_up():
    record = cliffwalk.measure(agents.prioritized, 8, 11, 100, agent="proportional")
    assert record["updates"] == [None] * cliffwalk.GIVE_UP_AFTER
    assert report.count_cell(record) == "not by 100, 0 of 3 seeds done"
    for name in ("uniform", "greedy TD error"):
        assert agents.AGENTS[name](problem(8), np.random.default_rng(0), 100) is None
    diverging = problem(4)
    diverging.theta[:] = 1e8
    assert agents.prioritized(diverging, np.random.default_rng(0), 10_000) is None


def test_intervals_and_ratios_are_those_of_known_samples():
    assert report.interval([7] * 5) == (7.0, 7.0)
    assert report.interval([5] * 5, [10] * 5) == (2.0, 2.0)
    counts = list(range(1, 102))
    low, high = report.interval(counts)
    assert 30 < low < 51 < high < 72
    assert report.median([1, 2, None]) == 2
    assert report.median([1, None, None]) == np.inf
    slow = {"updates": [None] * 3}
    assert report.ratio_cell(slow, {"updates": [10] * 5}) == ""


def test_new_records_replace_those_of_the_same_kind_in_the_file(tmp_path):
    path = tmp_path / "results.json"
    old = {"agent": "uniform", "n": 2, "representation": "tabular", "updates": [1]}
    other = old | {"n": 4}
    for arguments, records in ((1, [old, other]), (2, [old | {"updates": [9]}]), (2, [])):
        cliffwalk.merge(path, "study", {"runs": [{"args": arguments}], "records": records})
    kept = json.loads(path.read_text())["study"]
    assert [(r["n"], r["updates"]) for r in kept["records"]] == [(2, [9]), (4, [1])]
    assert [run["args"] for run in kept["runs"]] == [1, 2]


@pytest.mark.parametrize("extra", [[], ["--ablation"]])
def test_quick_run_prints_a_row_for_each_n_or_setting(extra, capsys):
    cliffwalk.main(["--quick", "--max-states", "2", *extra])
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("| ") and "---" not in line]
    settings = sum(map(len, cliffwalk.VARIED.values()))
    assert len(rows) == (3 + settings if extra else 4 * 2)


def test_picture_is_drawn_from_the_results_that_are_kept(tmp_path):
    records = json.loads((ROOT / cliffwalk.Args.json).read_text())["study"]["records"]
    report.plot(records, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["study", "ablation"])
def test_pages_show_the_results_that_are_kept(name):
    results = json.loads((ROOT / cliffwalk.Args.json).read_text())[name]["records"]
    page = report.PAGES[name].read_text()
    for record in results:
        middle = report.median(record["updates"])
        reached = np.isfinite(middle)
        assert (report.finite(middle) if reached else f"not by {record['limit']:,}") in page
