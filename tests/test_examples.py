import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SHORT = ["--total-steps", "800", "--eval-every", "400", "--select-episodes", "1"]
SHORT += ["--eval-episodes", "1"]


@pytest.mark.parametrize("uniform", [False, True])
def test_dqn_cartpole_runs_and_draws_its_picture(uniform, tmp_path, capsys):
    dqn = example("dqn_cartpole")
    arguments = [*SHORT, "--out", str(tmp_path)] + ["--uniform"] * uniform
    summary = dqn.main(dqn.parse_args(arguments))
    assert summary["environment steps"] == 800
    assert summary["replay"] == ("uniform" if uniform else "prioritized")
    assert Path(summary["picture"]).read_bytes().startswith(b"\x89PNG")
    assert "greedy return" in capsys.readouterr().out


def test_dqn_cartpole_is_fixed_by_its_seed():
    dqn = example("dqn_cartpole")
    (one, *first), (two, *second) = (dqn.train(dqn.parse_args(SHORT)) for _ in range(2))
    assert first == second
    assert first[0]
    for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(ours, theirs)


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
    pytest.importorskip("gymnasium")  # a machine with a GPU may lack it
    dqn = example("dqn_cudagraph")
    arguments = ["--steps", "30", "--transitions", "200", "--device", "cuda"]
    rows = dqn.main(dqn.parse_args(arguments))
    assert list(rows) == ["plain calls", "CUDA graph"]
    assert all(row["loss"] > 0 for row in rows.values())


def test_apex_transitions_sum_up_n_rewards_and_end_where_episodes_do():
    steps = example("apex").NStep(3, 0.5)
    states = torch.arange(6.0).unsqueeze(-1).expand(6, 4).contiguous().numpy()
    for k in range(5):
        steps.add(states[k], k % 2, 1.0 + k, states[k + 1], k == 4, False)
    batch = steps.take()
    assert batch["observation"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert batch["next", "observation"][:, 0].tolist() == [3, 4, 5, 5, 5]
    assert batch["action"].squeeze(-1).tolist() == [0, 1, 0, 1, 0]
    assert batch["next", "reward"].tolist() == [2.75, 4.5, 6.25, 6.5, 5.0]
    assert batch["discount"].tolist() == [0.125, 0.125, 0, 0, 0]
    for k in range(2):
        steps.add(states[k], 0, 1.0, states[k + 1], False, k == 1)
    assert steps.take()["discount"].tolist() == [0.25, 0.5]  # cut off by the time limit


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="shared buffers need Linux")
def test_apex_runs_with_its_actors():
    arguments = "--actors 2 --learner-steps 40 --eval-every 20 --select-episodes 1"
    arguments += " --eval-episodes 1 --learning-starts 200"
    command = [sys.executable, str(EXAMPLES / "apex.py"), *arguments.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    assert "gradient steps: 40.0" in done.stdout
    assert "transitions per second" in done.stdout
