import copy
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("gymnasium")
pytest.importorskip("matplotlib")

import gymnasium

from benchmarks.pages import BEGIN, DOCS, END
from benchmarks.studies.cartpole import __main__ as study
from benchmarks.studies.cartpole import jobs, report, training
from benchmarks.studies.cartpole.comparisons import Row
from benchmarks.studies.cartpole.learner import Learners
from benchmarks.studies.cartpole.results import Record, at_episodes, at_steps, curve_points, load
from benchmarks.studies.cartpole.settings import UNIFORM, VARIANTS, Replay, Settings, Variant
from benchmarks.studies.cartpole.tasks import MountainCars

SMALL = Settings(
    steps=120, hidden=(8, 6), batch_size=8, capacity=50, learning_starts=20, evaluate_every=60,
    evaluation_episodes=2,
)  # fmt: skip


class Stored:
    """A buffer that keeps the rows of each run, for tests that look at them."""

    def __init__(self, settings, replay, runs, generator):
        self.rows = [[] for _ in range(runs)]

    def __len__(self):
        return min(map(len, self.rows))

    def extend(self, rows, mask):
        for kept, row, stored in zip(self.rows, rows, mask, strict=True):
            if stored:
                kept.append(row[0])


@pytest.fixture
def stored(monkeypatch):
    monkeypatch.setattr(training, "make_buffer", Stored)


# --------------------------------------------------------------------------- the learner


def modules(learners):
    """Each run's network as a torch.nn module, and its target."""
    found = []
    for run in range(learners.runs):
        layers = []
        for weight, bias in learners.layers:
            linear = nn.Linear(weight.shape[2], weight.shape[1])
            linear.weight.data.copy_(weight[run])
            linear.bias.data.copy_(bias[run, 0])
            layers += [linear, nn.ReLU()]
        network = nn.Sequential(*layers[:-1])
        found.append((network, copy.deepcopy(network)))
    return found


def naive_step(network, target, optimizer, batch, gamma):
    """One DQN step as everybody writes it."""
    state, action, reward, following, terminated, weight = batch
    with torch.no_grad():
        wanted = reward + gamma * (~terminated) * target(following).max(1).values
    value = network(state).gather(1, action[:, None])[:, 0]
    loss = (weight * nn.functional.smooth_l1_loss(value, wanted, reduction="none")).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return (wanted - value).detach()


def test_learners_in_lockstep_are_separate_networks_with_separate_adams():
    g = torch.Generator().manual_seed(0)
    learners = Learners(3, (4, 16, 8, 2), lr=0.01, gamma=0.9, generator=g)
    twins = modules(learners)
    adams = [torch.optim.Adam(network.parameters(), 0.01) for network, _ in twins]
    for step in range(12):
        batch = (
            torch.randn(3, 5, 4, generator=g),
            torch.randint(2, (3, 5), generator=g),
            3 * torch.randn(3, 5, generator=g),  # on both of the loss's branches
            torch.randn(3, 5, 4, generator=g),
            torch.rand(3, 5, generator=g) < 0.3,
            torch.rand(3, 5, generator=g),
        )
        error = learners.learn(*batch)
        if step == 7:
            learners.copy_target()
        else:
            learners.mix_target(0.1)
        for run, ((network, target), adam) in enumerate(zip(twins, adams, strict=True)):
            rows = [leaf[run] for leaf in batch]
            expected = naive_step(network, target, adam, rows, 0.9)
            torch.testing.assert_close(error[run], expected, rtol=1e-4, atol=1e-5)
            for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
                slow.data.lerp_(fast.data, 1.0 if step == 7 else 0.1)
    state = torch.randn(3, 5, 4, generator=g)
    for run, (network, target) in enumerate(twins):
        for ours, twin in ((False, network), (True, target)):
            found = learners.values(state, target=ours)[run]
            torch.testing.assert_close(found, twin(state[run]), rtol=1e-4, atol=1e-5)
    assert (error.abs() > 1).any()
    assert (error.abs() < 1).any()


def test_networks_start_as_torch_starts_a_linear_layer_each_differently():
    g = torch.Generator().manual_seed(0)
    learners = Learners(20, (4, 64, 2), lr=0.01, gamma=0.9, generator=g)
    for layer, n in zip(learners.layers, (4, 64), strict=True):
        for leaf in layer:
            assert leaf.abs().max() <= n**-0.5
            assert leaf.std() == pytest.approx((n * 3) ** -0.5, rel=0.15)
    assert len(learners.parameters.unique(dim=0)) == 20
    assert torch.equal(learners.parameters, learners.target_parameters)


# --------------------------------------------------------------------------- environments


def test_mountain_cars_move_as_gymnasiums_does():
    ours = MountainCars(1)
    theirs = gymnasium.make("MountainCar-v0").unwrapped
    random = np.random.default_rng(0)
    ours.reset(seed=0)
    theirs.reset(seed=0)
    ends = 0
    for _ in range(3_000):
        # along the velocity, mostly: so that the wall and the goal are reached too
        best = 2 if ours.state[1, 0] >= 0 else 0
        action = int(random.integers(3)) if random.random() < 0.1 else best
        theirs.state = tuple(ours.state[:, 0])
        if ours.done[0]:
            ours.step(np.array([action]))
            continue
        observation, reward, terminated, _, _ = ours.step(np.array([action]))
        expected = theirs.step(action)
        np.testing.assert_allclose(observation[0], expected[0], rtol=1e-6, atol=1e-9)
        assert (reward[0], terminated[0]) == expected[1:3]
        ends += terminated[0]
    assert ends > 5


def test_mountain_cars_stop_after_200_steps_and_reset_in_the_step_after():
    cars, still = MountainCars(2), np.array([1, 1])
    cars.reset(seed=0)
    for _ in range(199):
        assert not np.any(cars.step(still)[2:4])
    assert cars.step(still)[3].all()
    observation, *others, _ = cars.step(np.array([2, 2]))
    assert ((observation[:, 0] >= -0.6) & (observation[:, 0] <= -0.4)).all()
    assert not observation[:, 1].any()
    assert not np.any(others)  # no reward, no end


@pytest.mark.parametrize("task", ["CartPole-v1", "MountainCar-v0"])
@pytest.mark.parametrize("sparse", [False, True])
def test_the_step_in_which_an_environment_resets_is_never_stored(task, sparse, stored):
    settings = replace(SMALL, task=task, failure_reward=sparse)
    lockstep = training.Lockstep(settings, UNIFORM, runs=3, seed=0)
    for _ in range(450):
        lockstep.step(0)  # random actions
    for run, kept in enumerate(lockstep.buffer.rows):
        rows = torch.stack(kept)
        assert len(rows) == lockstep.steps[run] == 450 - len(lockstep.episodes[run])
        ends = np.cumsum(lockstep.episodes[run])
        assert len(ends) >= 2
        first = np.setdiff1d(np.arange(len(rows)), ends)[1:]  # rows that follow another
        assert torch.equal(rows["observation"][first], rows["next_observation"][first - 1])
        step_reward = 1.0
        if task == "CartPole-v1":
            assert np.array_equal(rows["terminated"].nonzero()[:, 0] + 1, ends)
            assert (rows["observation"][ends[ends < len(rows)]].abs() <= 0.05).all()
        else:
            assert not rows["terminated"].any()  # the end of time is no end of value
            step_reward = -1.0
        reward = -rows["terminated"].float() if sparse else torch.full((len(rows),), step_reward)
        assert torch.equal(rows["reward"], reward)


# --------------------------------------------------------------------------- training


def test_the_same_seed_and_name_give_the_same_runs_and_others_do_not():
    first, again, other_seed, other_name = (
        training.train(SMALL, Replay(), runs=2, seed=seed, name=name).lengths
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(first, other_name)


@pytest.mark.parametrize(
    "replay", [Replay(beta_per_episode=0.01), Replay(beta_per_episode=0.0, beta_increment=1e-3)]
)
def test_beta_grows_with_the_episodes_or_with_the_gradient_steps(replay):
    lockstep = training.Lockstep(SMALL, replay, runs=2, seed=0)
    for step in range(150):
        lockstep.step(step)
        if len(lockstep.buffer) >= SMALL.learning_starts:
            lockstep.learn()
    finished = sum(map(len, lockstep.episodes)) / 2
    assert min(finished, lockstep.updates) > 3
    grown = replay.beta_per_episode * finished + replay.beta_increment * lockstep.updates
    assert lockstep.buffer.beta == pytest.approx(0.4 + grown)


def test_gradient_steps_come_as_often_as_asked_for(stored, monkeypatch):
    made = []
    monkeypatch.setattr(training.Lockstep, "learn", lambda self: made.append(self.steps.min()))
    training.train(replace(SMALL, update_every=4), UNIFORM, runs=2, seed=0)
    assert made[0] >= SMALL.learning_starts
    assert 20 <= len(made) <= 25


def test_training_ends_when_every_run_has_its_episodes():
    outcome = training.train(replace(SMALL, episodes=2), UNIFORM, runs=3, seed=0)
    assert (outcome.lengths > 0).sum(1).min() == 2
    assert outcome.steps.max() < SMALL.steps
    assert (outcome.lengths.sum(1) <= outcome.steps).all()


# --------------------------------------------------------------------------- comparisons


def record(lengths, steps=None, task="CartPole-v1"):
    lengths = np.array(lengths, np.uint16)
    steps = lengths.sum(1) if steps is None else steps
    about = {"settings": {"task": task, "evaluate_every": 10}}
    return Record(lengths, np.array([[9.0, 8.0]]), np.array(steps), about)


def test_windows_leave_out_the_runs_that_did_not_come_so_far():
    runs = record([[2, 3, 5, 10, 0], [4, 4, 4, 4, 4]])  # ends 2 5 10 20, 4 8 12 16 20
    for window, expected in {
        (0, 5): [2.5, 4], (5, 20): [7.5, 4], (10, 15): [np.nan, 4], (10, 21): [np.nan, np.nan],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(at_steps(runs, *window), expected)
    for window, expected in {
        (1, 2): [2.5, 4], (4, 5): [np.nan, 4], (4, 6): [np.nan, np.nan],
    }.items():  # fmt: skip
        np.testing.assert_array_equal(at_episodes(runs, *window), expected)
    ends, values = curve_points(runs, by_step=False, width=2, limit=5)
    np.testing.assert_array_equal(ends, [2, 4])
    np.testing.assert_array_equal(values, [[2.5, 7.5], [4, 4]])
    longer_is_worse = record([[200, 100]], task="MountainCar-v0")
    assert at_episodes(longer_is_worse, 1, 2) == [-150]
    assert at_steps(longer_is_worse, 200, 300) == [-100]


def test_a_verdict_needs_an_interval_without_one_half():
    low, high = np.arange(20.0), np.arange(20.0) + 15
    cases = {"better": (low, high), "worse": (high, low), "not apart": (low, low + 0.5)}
    for verdict, scores in cases.items():
        assert Row("w", "a", scores, (20, 20)).verdict == verdict
    tied = np.full(100, -200.0)
    assert Row("w", "a", (tied, tied), (100, 100)).verdict == "not apart"


def test_what_most_runs_did_not_reach_is_not_compared():
    row = Row("episodes 1 to 9", "prioritized", (np.zeros(4), np.ones(9)), (10, 10))
    assert row.censored
    assert not row.comparable
    line = report._line(row)
    assert "reached by 4 / 9 runs" in line[0]
    assert line[-1] == "too few runs"


# --------------------------------------------------------------------------- the command


@pytest.fixture
def tiny(monkeypatch):
    variant = Variant("Tiny", SMALL, ((20, 80),), ((1, 2),))
    agents = {"uniform": UNIFORM, "prioritized": Replay(), "alpha 1": Replay(alpha=1.0)}
    table = {"tiny": variant, "several": replace(variant, title="More", agents=agents)}
    monkeypatch.setattr(study, "VARIANTS", table)


def test_the_study_leaves_files_tables_plots_and_a_filled_page(tiny, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n")
    options = ["--seeds", "3", "--out", str(tmp_path), "--page", str(page)]
    study.main(options)
    assert {file.name for file in tmp_path.glob("*.npz")} == {
        "tiny.uniform.npz", "tiny.prioritized.npz",
        "several.uniform.npz", "several.prioritized.npz", "several.alpha-1.npz",
    }  # fmt: skip
    found = load(tmp_path / "tiny.prioritized.npz")
    assert found.about["replay"]["alpha"] == 0.6
    assert found.greedy.shape == (3, 2)
    text = page.read_text()
    assert re.search(r"\| steps 20 to 80 \| [\d.]+ \| ", text)
    assert re.search(r"\| alpha 1 \| [\d.]+ \[", text)
    for picture in ("curves", "improvement"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 1_000
    study.main([*options, "--report"])
    assert page.read_text() == text


def test_what_is_there_already_is_not_run_again(tiny, tmp_path, capsys, monkeypatch):
    options = ["--variants", "tiny", "--seeds", "2", "--out", str(tmp_path)]
    study.main(options)
    runs = []
    real = jobs.train
    monkeypatch.setattr(jobs, "train", lambda *a, **k: runs.append(k["name"]) or real(*a, **k))
    study.main(options)
    assert not runs
    assert capsys.readouterr().out.count("there already") == 2
    (tmp_path / "tiny.prioritized.npz").unlink()  # as if it had been killed
    study.main(options)
    assert runs == ["tiny/prioritized"]
    study.main([*options, "--seed", "1"])
    assert runs[1:] == ["tiny/uniform", "tiny/prioritized"]


def test_every_variant_compares_agents_that_differ_in_their_replay_alone():
    for variant in VARIANTS.values():
        assert next(iter(variant.agents.items())) == ("uniform", UNIFORM)
        assert len(set(variant.agents.values())) == len(variant.agents)


def test_the_results_that_are_kept_give_the_tables_on_the_page():
    block = report.block(VARIANTS, report.read(VARIANTS, study.OUT))
    assert f"{block}\n" == (study.OUT / "tables.md").read_text()
    assert block in (DOCS / "cartpole_study.md").read_text()
