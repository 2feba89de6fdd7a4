import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("ray")
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "apex_ray.py"


@pytest.mark.slow
def test_apex_ray_runs_with_its_actors_and_shards(cluster, capsys):
    spec = importlib.util.spec_from_file_location("apex_ray", EXAMPLE)
    apex = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(apex)
    arguments = ["--total-steps", "2000", "--learning-starts", "200", "--chunk", "50"]
    arguments += ["--eval-episodes", "1", "--batch-size", "16"]
    summary = apex.main(apex.parse_args(arguments))
    assert summary["gradient steps"] > 10
    assert summary["episodes"] > 3
    assert "samples per second" in capsys.readouterr().out


@pytest.mark.slow
def test_the_code_in_the_docs_runs_as_printed(cluster):
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "ray.md").read_text(), re.DOTALL)
    exec(compile(block, "docs/ray.md", "exec"), {"__name__": "docs"})
