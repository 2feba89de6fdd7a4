import importlib.util
from pathlib import Path

import pytest

import per_td.torchrl

EXAMPLES = Path(__file__).parents[2] / "examples"
SHORT = {
    "dqn_torchrl": ["--total-steps", "600", "--eval-every", "300", "--select-episodes", "1"],
    "sac_torchrl": [
        "--total-steps",
        "240",
        "--learning-starts",
        "210",
        "--check-every",
        "120",
        "--check-episodes",
        "1",
    ],
}

pytestmark = pytest.mark.skipif(
    not hasattr(per_td.torchrl, "TensorDictPrioritizedReplayBuffer"),
    reason="the examples need the drop-in buffer",
)


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name, *more):
    module = example(name)
    arguments = [*SHORT[name], "--eval-episodes", "1", *more]
    return module.main(module.parse_args(arguments))


@pytest.mark.parametrize("name", SHORT)
def test_an_example_runs_and_is_fixed_by_its_seed(name, capsys):
    summary, again = run(name), run(name)
    assert summary.pop("seconds")
    assert again.pop("seconds")
    assert summary == again
    assert summary["environment steps"] == int(SHORT[name][1])
    assert summary["gradient steps"] > 0
    assert summary["replay"] == "prioritized"
    assert "greedy return" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_an_example_can_draw_uniformly(name):
    assert run(name, "--uniform", "--seed", "1")["replay"] == "uniform"
