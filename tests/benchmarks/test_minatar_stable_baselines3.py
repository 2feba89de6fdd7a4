from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("minatar")
pytest.importorskip("stable_baselines3")

import stable_baselines3

from benchmarks.studies.minatar import stable_baselines3 as study
from benchmarks.studies.minatar.report import Runs
from benchmarks.studies.minatar.settings import Settings

SMALL = replace(Settings(), frames=300, explore_frames=100, learning_starts=40, copy_every=30)


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def agent(arm):
    env = study.Monitor(study.MinAtar("breakout", 0.1))
    return study.make_agent(SMALL, arm, env, seed=3)


def test_with_sb3s_buffer_the_agent_is_sb3s_own(monkeypatch):
    ours = agent("uniform").learn(SMALL.frames)
    monkeypatch.setattr(study.example, "PrioritizedDQN", stable_baselines3.DQN)
    monkeypatch.setattr(study, "Uniform", study.ReplayBuffer)
    theirs = agent("uniform").learn(SMALL.frames)
    assert type(theirs) is stable_baselines3.DQN
    assert ours._n_updates == theirs._n_updates == 65
    for one, other in zip(ours.q_net.parameters(), theirs.q_net.parameters(), strict=True):
        assert torch.equal(one, other)
    assert any(
        not torch.equal(one, other)
        for one, other in zip(
            ours.q_net.parameters(), agent("uniform").q_net.parameters(), strict=True
        )
    )


def test_the_agents_start_alike_and_only_one_has_priorities():
    uniform, prioritized = agent("uniform"), agent("proportional")
    for one, other in zip(
        uniform.policy.parameters(), prioritized.policy.parameters(), strict=True
    ):
        assert torch.equal(one, other)
    prioritized.learn(SMALL.frames)
    buffer = prioritized.replay_buffer.buffer
    assert len(buffer) == SMALL.frames
    assert (buffer.alpha, buffer.beta) == (0.6, 0.4)
    assert len(buffer.priority.unique()) > 50


def test_the_game_gives_back_the_same_images_for_a_seed():
    def images():
        game = study.MinAtar("breakout", 0.1)
        first, _ = game.reset(seed=5)
        return [first, *(game.step(k % 3)[0] for k in range(8))]

    first, second = images(), images()
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert all(image in study.MinAtar("breakout", 0.1).observation_space for image in first)
    assert not np.array_equal(first[0], first[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # processes of its own
def test_the_check_runs_goes_on_and_makes_its_table(tmp_path, capsys):
    options = ["--frames", "1400", "--seeds", "1", "--out", str(tmp_path)]
    study.main(options)
    table = (tmp_path / "tables.md").read_text()
    assert "| breakout, proportional | 1 | 1,400 |" in table
    for arm in study.COMPARED:
        runs = Runs(study.file_of_seed(tmp_path, "breakout", arm, 0))
        assert runs.ends.shape == runs.returns.shape
        assert (np.diff(runs.ends) > 0).all()
        assert 0 < runs.ends[0, 0] <= runs.ends[0, -1] <= 1_400
    capsys.readouterr()
    study.main(options)
    assert capsys.readouterr().out.count("there already") == 2
    with pytest.raises(SystemExit, match="expected runs with"):
        study.main(["--frames", "1500", *options[2:]])
