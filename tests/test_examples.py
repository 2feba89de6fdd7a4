import importlib.util
from pathlib import Path

import pytest

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


def test_dqn_cartpole_is_fixed_by_its_seed(tmp_path):
    dqn = example("dqn_cartpole")
    arguments = ["--total-steps", "800", "--eval-every", "400", "--select-episodes", "1"]
    arguments += ["--eval-episodes", "1", "--out", str(tmp_path)]
    first, second = (dqn.main(dqn.parse_args(arguments)) for _ in range(2))
    for name in ("episodes", "last_100_mean", "eval_mean"):
        assert first[name] == second[name]
