import csv
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.support.parameters import slow_but

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def one_thread():
    """As the examples' own command lines set it: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


SHORT = ["--total-steps", "800", "--eval-every", "400", "--select-episodes", "1"]
SHORT += ["--eval-episodes", "1"]


@pytest.mark.parametrize("option", slow_but([[]], [[], ["--uniform"]]))
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
    arguments = [*SHORT, "--total-steps", "400", "--learning-starts", "200"]
    (one, *first), (two, *second) = (dqn.train(dqn.parse_args(arguments)) for _ in range(2))
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
    short = {"learning_starts": 400, "log_every": 400, "save_every": 400, "capacity": 1_600}
    args = rainbow.Args(frames=8_000, out=str(tmp_path), **short)
    line = rainbow.train(args)
    assert line["size"] == 1_600
    assert 0 < line["loss"] < 1
    assert -21 <= line["return"] <= 21 or line["return"] != line["return"]  # no game has ended
    assert line["stale_updates"] == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    args.frames, args.resume = 9_000, True
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


# --------------------------------------------------------------------------- the recipes' files


@pytest.mark.usefixtures("one_thread")
def test_the_cleanrl_recipe_trains_and_changes_priorities():
    cleanrl = example("cleanrl_dqn")
    args = cleanrl.Args(total_timesteps=800, learning_starts=200, num_envs=2)
    returns, loss, replay = cleanrl.main(args)
    assert np.isfinite(loss)
    assert len(returns) > 10
    assert len(replay.buffer) == 800
    assert len(replay.buffer.priority.unique()) > 100


def test_the_cleanrl_recipe_stores_the_last_observation_of_an_episode_that_was_cut_off():
    gym = pytest.importorskip("gymnasium")
    make = [lambda: gym.make("CartPole-v1", max_episode_steps=5)] * 2
    envs = gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    replay = example("cleanrl_dqn").ReplayBuffer(100)
    obs, _ = envs.reset(seed=0)
    for k in range(12):
        after, rewards, terminated, _, infos = envs.step(np.full(2, k % 2))
        replay.add(obs, after, np.full(2, k % 2), rewards, terminated, infos)
        obs = after
    found = replay.buffer.transitions
    assert not found["dones"].any()
    assert found["actions"].shape == found["rewards"].shape == (24, 1)
    first, second = found["observations"][:-2], found["next_observations"][:-2]
    goes_on = (second == found["observations"][2:]).all(-1)
    ends = torch.tensor([4, 9])  # steps after which an environment was reset
    assert (~goes_on).nonzero().squeeze(-1).tolist() == sorted([*(2 * ends), *(2 * ends + 1)])
    # the position follows from the one before: the first of another episode would not fit
    torch.testing.assert_close(second[:, 0], first[:, 0] + 0.02 * first[:, 1])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_cleanrl_recipe_learns():
    args = example("cleanrl_dqn").Args(total_timesteps=12_000)
    returns, _, _ = example("cleanrl_dqn").main(args)
    assert np.mean(returns[-20:]) > 80  # 22 by random actions


@pytest.mark.usefixtures("one_thread")
def test_the_stable_baselines3_recipe_trains_and_changes_priorities():
    pytest.importorskip("stable_baselines3")
    recipe = example("stable_baselines3_dqn")
    figures = recipe.main(recipe.parse_args(["--steps", "300", "--learning-starts", "100"]))
    assert 8 <= figures["greedy return"] <= 500
    assert figures["distinct priorities"] > 50


def sb3_of(recipe, **settings):
    gym = pytest.importorskip("gymnasium")
    env = gym.make("CartPole-v1", max_episode_steps=5)
    return recipe.PrioritizedDQN(
        "MlpPolicy", env, buffer_size=100, learning_starts=20, batch_size=8, device="cpu", seed=0,
        replay_buffer_class=recipe.PrioritizedReplay, **settings,
    )  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_the_stable_baselines3_recipe_ends_no_value_at_a_time_limit_and_saves_its_buffer(tmp_path):
    pytest.importorskip("stable_baselines3")
    recipe = example("stable_baselines3_dqn")
    sys.modules[recipe.__name__] = recipe  # pickle looks the class up
    try:
        model = sb3_of(recipe, replay_buffer_kwargs={"alpha": 0.7}).learn(42)
        buffer = model.replay_buffer.buffer
        assert buffer.alpha == 0.7
        assert len(buffer) == model.replay_buffer.size() == 44  # whole rollouts of 4 steps
        found = buffer.transitions
        assert not found["dones"].any()
        torch.testing.assert_close(
            found["next_observations"][:, 0],
            found["observations"][:, 0] + 0.02 * found["observations"][:, 1],
        )
        model.save_replay_buffer(tmp_path / "buffer.pkl")
        other = sb3_of(recipe)
        other.load_replay_buffer(tmp_path / "buffer.pkl")
        assert torch.equal(other.replay_buffer.buffer.priority, buffer.priority)
        assert len(buffer.priority.unique()) > 4
    finally:
        del sys.modules[recipe.__name__]


def test_the_stable_baselines3_recipe_refuses_what_it_does_not_do():
    pytest.importorskip("stable_baselines3")
    recipe = example("stable_baselines3_dqn")
    with pytest.raises(ValueError, match="optimize_memory_usage: expected False"):
        sb3_of(recipe, optimize_memory_usage=True)
    model = sb3_of(recipe).learn(30)
    with pytest.raises(ValueError, match="VecNormalize"):
        model.replay_buffer.sample(4, env=model.env)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.slow
def test_the_stable_baselines3_recipe_learns():
    pytest.importorskip("stable_baselines3")
    recipe = example("stable_baselines3_dqn")
    figures = recipe.main(recipe.parse_args(["--steps", "30000"]))
    assert figures["greedy return"] > 200  # 22 by random actions


def test_her_sets_goals_that_were_reached_later_in_the_same_episode():
    her = example("her_torchrl")
    torch.manual_seed(0)
    args = her.Args(bits=4, batch_size=200, capacity=1_000)
    buffer, learner = her.make_buffer(args), her.Learner(args)
    data = her.play(learner.network, 4, episodes=30, explore=1.0)
    buffer.extend(data)
    batch = buffer.sample()
    relabelled = int(0.8 * 200)
    ends = data["next", "done"].squeeze(-1).nonzero().squeeze(-1)
    for slot, goal in zip(batch["index"][:relabelled], batch["desired_goal"], strict=False):
        end = ends[ends >= slot][0]
        assert (data["next", "achieved_goal"][slot : end + 1] == goal).all(-1).any()
    kept = batch["index"][relabelled:]
    assert torch.equal(batch["desired_goal"][relabelled:], data["desired_goal"][kept])
    reached = (batch["next", "achieved_goal"] == batch["desired_goal"]).all(-1, keepdim=True)
    assert reached[:relabelled].any()
    assert not reached[:relabelled].all()
    assert torch.equal(batch["next", "terminated"], reached)
    assert torch.equal(batch["next", "reward"], reached.float() - 1)
    learner.learn(batch)
    buffer.update_tensordict_priority(batch)
    assert len(buffer.sampler.priority.unique()) > 20


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_her_learns_what_the_same_agent_cannot_learn_without_it():
    her = example("her_torchrl")
    reached = {}
    for ratio in (0.8, 0.0):
        args = her.Args(bits=8, rounds=30, updates=20, her_ratio=ratio, capacity=5_000)
        learner, _ = her.train(args)
        reached[ratio] = her.success(learner, args)
    assert reached[0.8] > 0.7
    assert reached[0.0] < 0.1


@pytest.mark.usefixtures("one_thread")
def test_the_offline_recipe_reads_what_was_written_and_finds_the_way(tmp_path):
    h5py = pytest.importorskip("h5py")
    offline = example("offline_hdf5")
    file = tmp_path / "main_data.hdf5"
    offline.write_file(file, episodes=20, seed=1)
    with h5py.File(file) as found:
        lengths = [len(group["actions"]) for group in found.values()]
        assert all(group["observations"].shape == (n + 1, 15) for group, n in
                   zip(found.values(), lengths, strict=True))  # fmt: skip
        ended = sum(int(group["terminations"][-1]) for group in found.values())
        cut_off = sum(int(group["truncations"][-1]) for group in found.values())
    assert ended > 3
    assert cut_off > 3
    assert ended + cut_off == 20
    buffer = offline.fill(file, alpha=0.6, beta=0.4)
    assert len(buffer) == sum(lengths)
    assert buffer.transitions["next", "terminated"].sum() == ended
    assert torch.equal(
        buffer.transitions["next", "reward"], buffer.transitions["next", "terminated"].float()
    )
    network, buffer = offline.main(offline.parse_args(["--file", str(file), "--steps", "400"]))
    assert offline.steps_to_the_end(network) == 14
    assert np.mean(lengths) > 80
    assert len(buffer.priority.unique()) > 20


LOGGED = ["--steps", "300", "--log-every", "100"]
FIGURES = ["loss", "replay/effective_share", "replay/draw_count/max", "replay/stale_updates"]


def test_diagnostics_go_to_a_csv_file_without_tensorboard(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # not installed
    logs = example("log_diagnostics")
    buffer, _ = logs.main(logs.parse_args([*LOGGED, "--out", str(tmp_path)]))
    with (tmp_path / "diagnostics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["step"] for row in rows] == ["100", "200", "300"]
    assert set(FIGURES) <= set(rows[0])
    last = {name: float(value) for name, value in rows[-1].items()}
    assert np.isfinite([last[name] for name in FIGURES]).all()
    assert last["replay/priority/max"] == pytest.approx(float(buffer.priority.max()))
    assert last["replay/size"] == 4_800


@pytest.mark.filterwarnings("ignore")  # tensorboard's own
def test_diagnostics_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logs = example("log_diagnostics")
    buffer, _ = logs.main(logs.parse_args([*LOGGED, "--out", str(tmp_path)]))
    found = EventAccumulator(str(tmp_path)).Reload()
    assert set(FIGURES) <= set(found.Tags()["scalars"])
    scalars = found.Scalars("replay/priority/max")
    assert [scalar.step for scalar in scalars] == [100, 200, 300]
    assert scalars[-1].value == pytest.approx(float(buffer.priority.max()))


def test_diagnostics_go_to_weights_and_biases_offline_if_asked(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, figures, step):
            calls.append((step, set(FIGURES) <= set(figures)))

    def init(**settings):
        calls.append(settings["mode"])
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    logs = example("log_diagnostics")
    logs.main(logs.parse_args([*LOGGED, "--wandb", "--out", str(tmp_path)]))
    assert calls == ["offline", (100, True), (200, True), (300, True)]


@pytest.mark.usefixtures("one_thread")
def test_the_logged_task_learns_its_values(tmp_path, monkeypatch):
    logs = example("log_diagnostics")
    monkeypatch.setattr(logs, "make_log", lambda folder, wandb: lambda figures, step: None)
    _, values = logs.main(logs.parse_args(["--steps", "1500", "--out", str(tmp_path)]))
    assert (values[1:20] - torch.arange(1, 20) / 20).abs().mean() < 0.15  # 0.5 at the start
