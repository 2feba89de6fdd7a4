import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from benchmarks.studies import predictors
from benchmarks.studies.predictors import Setting
from per_td import PrioritizedReplayBuffer

KEY = "effective_share"


def setting(study, figure, gain):
    return Setting(study, "one", np.array(gain), {KEY: np.array(figure)})


def test_a_gain_is_the_share_of_uniform_runs_that_a_run_beats():
    found = predictors.gains(np.array([0.0, 2.0, 9.0]), np.array([1.0, 2.0, 3.0, 4.0]))
    assert found.tolist() == [0.0, 0.375, 1.0]  # a tie counts half


def test_rank_correlations_are_those_of_scipy():
    rng = np.random.default_rng(0)
    x, y = rng.integers(5, size=40), rng.normal(size=40)  # with ties
    assert predictors.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert np.isnan(predictors.spearman(np.ones(4), y[:4]))


def test_runs_are_compared_between_settings_and_within_them():
    low, high = setting("a", [1, 2, 3], [0.3, 0.2, 0.1]), setting("a", [4, 5, 6], [0.9, 0.8, 0.7])
    assert predictors.across([low, high], KEY) > 0.4  # the setting with more gains more
    assert predictors.within([low, high, low], KEY) == pytest.approx(-1)  # its runs the other way
    assert np.isnan(predictors.within([low, high], KEY))  # too few for an interval


def test_what_is_not_known_is_left_out():
    known, unknown = setting("a", [1, 2, 3], [1, 2, 3]), setting("a", [np.nan] * 3, [9, 8, 7])
    assert predictors.across([known, unknown], KEY) == pytest.approx(1)
    assert predictors.within([known, known, known, unknown], KEY) == pytest.approx(1)
    assert np.isnan(predictors.within([known, known, unknown, unknown], KEY))


def test_an_interval_draws_settings_again_within_their_study(monkeypatch):
    monkeypatch.setattr(predictors, "REPETITIONS", 50)
    rng = np.random.default_rng(1)
    settings = [
        setting(study, x := rng.normal(size=20), x + rng.normal(size=20))
        for study in "ab"
        for _ in range(4)
    ]
    middle, low, high = predictors.with_interval(settings, predictors.within, KEY)
    assert 0.3 < low < middle < high < 1
    assert "effective" in predictors.report(
        [Setting(s.study, s.name, s.gain, dict.fromkeys(predictors.KEYS, s.figures[KEY]))
         for s in settings]
    )  # fmt: skip


def test_a_buffer_is_looked_at_once():
    watch = predictors.Watch(2)
    buffer = PrioritizedReplayBuffer(8, 4, track_draws=True)
    buffer.extend({"x": torch.rand(8)})
    for step in range(1, 4):
        index = buffer.sample()["index"]
        buffer.update_priority(index, torch.rand(4))
        watch(step, buffer)
        if step == 2:
            then = buffer.diagnostics()
    assert watch.found == {key: then[key] for key in predictors.KEYS}


def test_each_setting_has_a_file_of_its_own(tmp_path):
    files = {predictors.file_of(tmp_path, key) for key in predictors.tasks()}
    assert len(files) == len(predictors.tasks())


@pytest.mark.slow
def test_runs_are_kept_and_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(predictors, "CLIFFWALK", {"n": 8, "seeds": 2, "at": 5, "limit": 20})
    key = "Blind Cliffwalk", "alpha 0.6"
    assert predictors.work(key, tmp_path).endswith("done")
    assert predictors.work(key, tmp_path).endswith("there already")
    monkeypatch.setattr(predictors, "minatar", lambda: iter(()))
    [one] = predictors.read(tmp_path)
    assert one.name == "alpha 0.6"
    assert (one.gain == 0).all()  # twenty updates are too few for any
    assert np.isfinite(one.figures["effective_share"]).all()
