"""The pages of docs/recipes: their code runs as printed, and does what they say."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "recipes"
PAGES = {path.stem: path.read_text() for path in sorted(FOLDER.glob("*.md"))}
TOOLS = {  # page -> its program in examples/, what it needs
    "cleanrl": ("cleanrl_dqn", "gymnasium"),
    "her": ("her_torchrl", "torchrl"),
    "logging": ("log_diagnostics", "torch"),
    "offline": ("offline_hdf5", "h5py"),
    "stable_baselines3": ("stable_baselines3_dqn", "stable_baselines3"),
}
RECIPES = sorted(set(PAGES) - {"index"} - set(TOOLS))


def blocks_of(page: str, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def code_of(page: str) -> str:
    (code,) = blocks_of(page)
    return code


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


def cleanrl(found):
    buffer, data = found["rb"].buffer, found["data"]
    assert torch.equal(data.observations, torch.from_numpy(found["obs"]).expand(32, 4))
    assert torch.equal(data.next_observations, torch.from_numpy(found["next_obs"]).expand(32, 4))
    assert data.actions.shape == data.rewards.shape == data.dones.shape == (32, 1)
    assert found["loss"] == 1
    assert buffer.priority.tolist() == [pytest.approx(1 + 1e-6)]


def her(found):
    batch = found["batch"]
    assert (batch["desired_goal"][:25] < 2).all()  # 2 is no bit: these are relabelled
    assert (batch["desired_goal"][25:] == 2).all()
    assert (batch["next", "reward"][:25] == 0).any()
    last = dict(zip(batch["index"].tolist(), batch["td_error"].tolist(), strict=True))
    priority = found["buffer"].sampler.priority[list(last)]
    torch.testing.assert_close(priority, torch.tensor(list(last.values())))


def logging(found):
    diagnostics = found["buffer"].diagnostics()
    assert set(found["figures"]) == {f"replay/{name}" for name in diagnostics}
    assert found["figures"]["replay/size"] == 800
    assert 0 < found["figures"]["replay/effective_share"] < 1


def offline(found):
    data, buffer = found["data"], found["buffer"]
    assert len(buffer) == len(data) == 30
    assert torch.equal(data["next", "observation"][:9], data["observation"][1:10])
    assert data["next", "terminated"].nonzero().squeeze(-1).tolist() == [9, 19, 29]
    error = data["next", "reward"] - data["observation"].sum(-1)
    torch.testing.assert_close(buffer.priority, error.abs() + 1e-6)


def stable_baselines3(found):
    buffer = found["model"].replay_buffer.buffer
    assert len(buffer) == 300
    assert found["model"]._n_updates > 40
    assert 0 < found["figures"]["effective_share"] < 1


TOOL_CHECKS = [cleanrl, her, logging, offline, stable_baselines3]


def test_every_recipe_has_its_check():
    assert [check.__name__ for check in CHECKS] == RECIPES
    assert [check.__name__ for check in TOOL_CHECKS] == sorted(TOOLS)


@pytest.mark.parametrize("check", CHECKS + TOOL_CHECKS, ids=lambda check: check.__name__)
def test_the_code_runs_as_printed_and_does_what_the_page_says(check, monkeypatch):
    page = check.__name__
    if page in TOOLS:
        pytest.importorskip(TOOLS[page][1])
    monkeypatch.chdir(ROOT)
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


def statements(code: str) -> set[str]:
    """The lines of a program, without indentation, notes and the types of arguments."""
    lines = (line.split("  #")[0].strip() for line in code.splitlines())
    return {line for line in lines if line}


@pytest.mark.parametrize("page", TOOLS)
def test_each_tools_page_shows_a_program_of_150_lines_how_to_run_it_and_its_limits(page):
    name = f"examples/{TOOLS[page][0]}.py"
    program = (ROOT / name).read_text()
    assert len(program.splitlines()) <= 150
    assert f"(../../{name})" in PAGES[page]
    assert re.findall(r"^## (.*)", PAGES[page], re.M)[0] == "Run it"
    assert {"## The code that matters", "## Limits"} < set(PAGES[page].splitlines())
    (commands,) = blocks_of(page, "bash")
    usage = program.split('"""')[1]
    for line in commands.splitlines():
        command = line.split("  #")[0]
        assert command in usage
        for flag in re.findall(r"--([a-z-]+)", command if name in command else ""):
            words = flag.replace("-", "_")
            assert f'"--{flag}"' in program or f"    {words}: " in program
    lines = [line for line in code_of(page).splitlines() if line.strip()]
    assert 10 <= len(lines) <= 45
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("page", ["cleanrl", "her", "logging", "stable_baselines3"])
def test_what_a_tools_page_prints_of_its_program_is_in_the_program(page):
    program = statements((ROOT / "examples" / f"{TOOLS[page][0]}.py").read_text())
    code = code_of(page)
    bodies = re.findall(r"^    def \w+.*?\n((?:        .*\n|\n(?=        ))+)", code, re.M)
    bodies += re.findall(r"^def \w+.*?\n((?:    .*\n)+)", code, re.M)
    if page == "stable_baselines3":
        (change,) = blocks_of(page, "diff")
        bodies = ["".join(line[1:] + "\n" for line in change.splitlines() if line[0] in "+ ")]
    assert bodies
    missing = set().union(*map(statements, bodies)) - program
    assert not missing


def test_the_folder_opens_with_what_was_found_of_all_of_them():
    assert "2407.09702" in PAGES["index"].split("|")[0]
    for page in [*RECIPES, *TOOLS]:
        assert f"({page}.md)" in PAGES["index"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (FOLDER / target).exists(), target
