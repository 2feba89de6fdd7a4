import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("uniform", [False, True])
def test_dqn_cartpole_runs_and_draws_its_picture(uniform, tmp_path, capsys):
    dqn = example("dqn_cartpole")
    arguments = ["--total-steps", "800", "--eval-every", "400", "--select-episodes", "1"]
    arguments += ["--eval-episodes", "1", "--out", str(tmp_path)]
    summary = dqn.main(dqn.parse_args(arguments + ["--uniform"] * uniform))
    assert summary["steps"] == 800
    assert summary["replay"] == ("uniform" if uniform else "prioritized")
    assert Path(summary["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "greedy return" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_dqn_cudagraph_runs_on_the_cpu_and_prints_its_table(capsys):
    dqn = example("dqn_cudagraph")
    rows = dqn.main(dqn.parse_args(["--steps", "30", "--transitions", "200"]))
    assert list(rows) == ["plain calls", "torch.compile"]
    assert all(row["loss"] > 0 and row["steps_per_second"] > 0 for row in rows.values())
    assert "steps per second" in capsys.readouterr().out


def test_dqn_cudagraph_says_so_where_it_cannot_compile(capsys, monkeypatch):
    def fail(learner):
        raise RuntimeError("No working C++ compiler found")

    dqn = example("dqn_cudagraph")
    monkeypatch.setattr(dqn, "compiled", fail)
    rows = dqn.main(dqn.parse_args(["--steps", "30", "--transitions", "200"]))
    assert list(rows) == ["plain calls"]
    assert "cannot be used here: No working C++ compiler" in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dqn_cudagraph_replays_a_graph_on_cuda():
    dqn = example("dqn_cudagraph")
    arguments = ["--steps", "30", "--transitions", "200", "--device", "cuda"]
    rows = dqn.main(dqn.parse_args(arguments))
    assert list(rows) == ["plain calls", "CUDA graph"]
    assert all(row["loss"] > 0 for row in rows.values())


def test_dqn_cartpole_is_fixed_by_its_seed(tmp_path):
    dqn = example("dqn_cartpole")
    arguments = ["--total-steps", "800", "--eval-every", "400", "--select-episodes", "1"]
    arguments += ["--eval-episodes", "1", "--out", str(tmp_path)]
    first, second = (dqn.main(dqn.parse_args(arguments)) for _ in range(2))
    for name in ("episodes", "last_100_mean", "eval_mean"):
        assert first[name] == second[name]
