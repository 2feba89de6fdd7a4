import importlib.util
from pathlib import Path

import pytest

from tests.support.pages import blocks, starts_ray

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "apex_ray.py"


@pytest.fixture
def apex():
    spec = importlib.util.spec_from_file_location("apex_ray", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_apex_ray_runs_with_its_actors_and_shards(cluster, capsys, apex, given_to_actors):
    arguments = ["--total-steps", "2000", "--learning-starts", "200", "--chunk", "50"]
    arguments += ["--eval-episodes", "1", "--batch-size", "16"]
    summary = apex.main(apex.parse_args(arguments))
    assert summary["gradient steps"] > 10
    assert summary["episodes"] > 3
    assert "samples per second" in capsys.readouterr().out
    # Ray warns of anything else: a restarted actor may not find it in the object store
    assert len(given_to_actors) > 8
    assert all(size < 10_000 and not handles for size, handles in given_to_actors)


@pytest.mark.slow
def test_an_actor_of_apex_ray_that_died_acts_again(sharded, apex):
    import ray

    buffer, args = sharded(1, 1000), apex.parse_args(["--chunk", "20"])
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(apex.Actor).remote(0, args)
    weights = apex.make_network().state_dict()
    assert ray.get(actor.act.remote(weights, buffer.writer()))[0] == 20
    ray.kill(actor, no_restart=False)
    assert ray.get(actor.act.remote(weights, buffer.writer()))[0] == 20
    assert len(buffer) > 30
    ray.kill(actor)


@pytest.mark.slow
@pytest.mark.parametrize(("where", "code"), [b for b in blocks() if starts_ray(b[1])])
def test_the_code_in_the_docs_runs_as_printed(cluster, where, code):
    exec(compile(code, where, "exec"), {"__name__": "docs"})
