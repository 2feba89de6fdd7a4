"""The pages of docs/recipes: their code runs as printed, and does what they say."""

import re
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
RECIPES = sorted(set(PAGES) - {"index"})


def code_of(page: str) -> str:
    return "".join(re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL))


def laber(found):
    assert found["large"].shape == (4 * found["minibatch"],)
    mean = found["score"].mean() / found["score"][found["index"]]
    torch.testing.assert_close(found["weight"], mean)


def grpo(found):
    assert len(found["batch"][3]) == len(found["made"]) + found["replayed"]
    assert (found["step"] - found["batch"][3] <= found["max_age"]).all()
    replayed = slice(len(found["made"]), None)
    assert (found["batch"][3][replayed] < found["step"]).all()
    assert (found["batch"][2][replayed] != 0).all()


def pufferlib(found):
    assert len(found["index"].unique()) == found["minibatch"]
    p = found["priority"].double() ** found["alpha"]
    expected = (found["segments"] * p / p.sum()) ** -found["beta"]
    torch.testing.assert_close(found["weight"], expected[found["index"]].float())


def learnable(found):
    last = dict(zip(found["batch"]["index"].tolist(), found["gain"].tolist(), strict=True))
    priority = found["buffer"].priority[list(last)]
    torch.testing.assert_close(priority, torch.tensor(list(last.values())) + 1e-5)
    assert (found["relo"] >= 0).all()
    # an ensemble that agrees, and is right on average, has nothing to learn but noise
    noise = torch.randn(50, 1).expand(10, 50, 1)
    assert found["information_gain"](noise, noise[0].mean(0)).item() == pytest.approx(0, abs=1e-5)


def uniform_mix(found):
    assert found["largest"] <= found["u"] ** -found["beta"] * (1 + 1e-5)


def lap(found):
    assert found["buffer"].priority.min() >= 1
    delta = torch.linspace(-3, 3, 7).unsqueeze(-1).requires_grad_()
    found["huber"](delta).sum().backward()
    by_priority = delta.grad * delta.detach().abs().clamp(min=1) ** found["alpha"]
    delta.grad = None
    found["pal"](delta).sum().backward()
    ratio = delta.grad[by_priority != 0] / by_priority[by_priority != 0]
    torch.testing.assert_close(ratio, ratio[0].expand(len(ratio)))  # the paper's equivalence


def la3p(found):
    assert found["buffer"].priority.min() >= 1


def curious_replay(found):
    buffer, batch = found["buffer"], found["batch"]
    last = dict(zip(batch["index"].tolist(), found["curiosity"].tolist(), strict=True))
    torch.testing.assert_close(buffer.priority[list(last)], torch.tensor(list(last.values())))


def ere(found):
    assert found["newest"] == found["c_min"]
    assert (batch_age(found) < found["newest"]).all()


def batch_age(found):
    return len(found["buffer"]) - 1 - found["batch"]["index"]


def plr(found):
    assert (found["buffer"].priority > 0).all()
    assert len(found["buffer"]) + len(found["unseen"]) == found["levels"]


def cer(found):
    assert found["batch"].shape == (32,)


CHECKS = [cer, curious_replay, ere, grpo, la3p, laber, lap, learnable, plr, pufferlib, uniform_mix]


def test_every_recipe_has_its_check():
    assert [check.__name__ for check in CHECKS] == RECIPES


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_runs_as_printed_and_does_what_the_page_says(check):
    page = check.__name__
    torch.manual_seed(0)
    found = {"__name__": page}
    exec(compile(code_of(page), f"{page}.md", "exec"), found)
    check(found)


@pytest.mark.parametrize("page", RECIPES)
def test_each_page_has_twenty_to_forty_lines_of_code_its_settings_and_its_evidence(page):
    lines = [line for line in code_of(page).splitlines() if line.strip()]
    assert 20 <= len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert "Settings" in PAGES[page]
    assert "Evidence:" in PAGES[page]


def test_the_folder_opens_with_what_was_found_of_all_of_them():
    assert "2407.09702" in PAGES["index"].split("|")[0]
    for page in RECIPES:
        assert f"({page}.md)" in PAGES["index"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", PAGES[page]):
        assert (FOLDER / target).exists(), target
