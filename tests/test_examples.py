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


@pytest.mark.parametrize("option", [[], ["--uniform"]])
def test_dqn_cartpole_runs_draws_its_picture_and_ends_with_a_verdict(option, tmp_path, capsys):
    dqn = example("dqn_cartpole")
    table = dqn.main(dqn.parse_args([*SHORT, "--out", str(tmp_path), *option]))
    kind = "uniform" if option else "prioritized"
    assert list(table) == [kind]
    assert table[kind]["environment steps"] == 800
    assert (tmp_path / f"{kind}-seed0.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out.splitlines()
    mean = table[kind]["mean return of the best network, greedy"]
    assert printed[-1] == (
        f"NOT SOLVED with {kind} replay: the best network's greedy mean return over 1 fresh"
        f" episodes is {mean:.1f}, wanted 450"
    )


def test_dqn_cartpole_compares_both_kinds_of_replay_in_one_picture(tmp_path, capsys):
    dqn = example("dqn_cartpole")
    draw, pictured = dqn.save_picture, []
    dqn.save_picture = lambda path, curves: (draw(path, curves), pictured.append(curves))
    args = dqn.parse_args([*SHORT, "--compare", "--out", str(tmp_path)])
    table = dqn.main(args)
    printed = capsys.readouterr().out
    picture = tmp_path / "prioritized-uniform-seed0.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    [curves] = pictured
    assert list(table) == list(curves) == ["prioritized", "uniform"]
    args.uniform = True  # and the second of two runs is as it is alone
    _, *alone = dqn.train(args)
    assert curves["uniform"] == tuple(alone)
    assert curves["prioritized"] != curves["uniform"]
    assert all(f"SOLVED with {kind} replay" in printed for kind in table)
    [row] = [line for line in printed.splitlines() if line.startswith("training episodes")]
    assert row.split()[-2:] == [f"{table[kind]['training episodes']:,}" for kind in table]


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


@pytest.mark.slow
def test_rainbow_atari_learns_a_little_and_goes_on_from_its_checkpoint(tmp_path):
    rainbow = example("rainbow_atari")
    short = {"learning_starts": 1_000, "log_every": 1_000, "save_every": 1_000, "capacity": 4_000}
    args = rainbow.Args(frames=20_000, out=str(tmp_path), **short)
    line = rainbow.train(args)
    assert line["size"] == 4_000
    assert 0 < line["loss"] < 1
    assert -21 <= line["return"] <= 21 or line["return"] != line["return"]  # no game has ended
    assert line["stale_updates"] == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    args.frames, args.resume = 22_000, True
    rainbow.train(args)


def test_rainbow_ataris_buffer_keeps_each_frame_once():
    rainbow = example("rainbow_atari")
    buffer = rainbow.make_buffer(rainbow.Args(frames=8_000, capacity=1_000, num_envs=2))
    stack = torch.randint(255, (2, 5, 84, 84), dtype=torch.uint8)
    data = {"observation": stack[:, :4], "next": {"observation": stack[:, 1:]}}
    buffer.extend(rainbow.TensorDict(data | {"discount": torch.ones(2)}, [2]))
    assert buffer.nbytes < 1.2 * 1_000 * 84 * 84
    batch = buffer.sample(8)
    assert torch.equal(batch["observation"], stack[batch["index"], :4])
    assert torch.equal(batch["next", "observation"], stack[batch["index"], 1:])
