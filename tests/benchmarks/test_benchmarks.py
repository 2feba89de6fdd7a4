"""The benchmarks run and say what they should; how fast anything is, is not tested."""

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("ray")

from benchmarks import pages, profiles, ray_shards, report
from benchmarks.__main__ import main
from benchmarks.case import Case, Goal, Ref, quick
from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS
from benchmarks.exactness import distance, expected
from benchmarks.goals import judge
from benchmarks.race import TOTAL, Entry, Part, race, ratio, spread
from benchmarks.studies import scale_simulation
from benchmarks.workload import Point, Pool


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    only = ("growth", "methods-distinct", "layouts", "exactness", "profile", "cuda-capacity")
    path = main(["--quick", "--profile", "--only", *only, "--out", str(folder)])
    torch.set_num_threads(threads)
    return path


@pytest.fixture(scope="module")
def cases(results):
    return {case["name"]: case for case in json.loads(results.read_text())["cases"]}


# --------------------------------------------------------------------------- results


def test_a_run_leaves_json_that_says_where_its_numbers_come_from(results):
    found = json.loads(results.read_text())
    assert found["machine"]["threads_used"] == 1
    assert found["versions"]["torch"] == torch.__version__
    assert {"format", "date", "seed", "commit", "seconds"} <= found.keys()
    assert found["quick"]
    assert "--quick" in found["command"]


def test_every_measured_row_has_a_median_between_its_quartiles(cases):
    rows = cases["growth"]["rows"] + cases["methods-distinct"]["rows"]
    timed = [row for row in rows if row.get("unit") == "us"]
    assert {row["part"] for row in timed} == {"sample", "update", TOTAL}
    assert all(0 < row["q1"] <= row["median"] <= row["q3"] for row in timed)
    for goal in cases["growth"]["goals"]:
        assert goal["reached"] == (goal["median"] <= goal["limit"])


def test_draws_are_as_far_from_the_right_distribution_as_perfect_ones(cases):
    rows = [r for r in cases["exactness"]["rows"] if r["contestant"] == "per_td: tree"]
    assert {row["masses"] for row in rows} == {"equal", "random"}
    assert all(row["chi2_p"] > 1e-6 and row["outside"] == 0 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_needs_a_missing_device_is_listed_without_a_number(results, cases):
    cuda = cases["cuda-capacity"]
    assert (cuda["not_run"], cuda["rows"]) == ("no CUDA device", [])
    assert all("median" not in goal for goal in cuda["goals"])
    assert "not run: no CUDA device" in results.with_suffix(".md").read_text()


def test_the_page_has_every_case_and_its_plots(results, cases):
    page = results.with_suffix(".md").read_text()
    assert all(f"## {case['title']}" in page for case in cases.values())
    for plot in ("growth", "methods-distinct", "exactness", "profile"):
        file = results.with_name(f"{results.stem}-{plot}.png")
        assert file.stat().st_size > 1000
        assert f"({file.name})" in page


def test_publishing_fills_the_marked_block_and_nothing_else(results, tmp_path):
    (tmp_path / "cpu.json").write_text(results.read_text())
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    assert report.publish(tmp_path, page)
    once = page.read_text()
    assert once.startswith(f"before\n{pages.BEGIN}")
    assert once.endswith(f"{pages.END}\nafter\n")
    assert "old" not in once
    assert "bytes of priority state" in once
    assert report.publish(tmp_path, page)
    assert page.read_text() == once
    page.write_text("no block")
    with pytest.raises(ValueError, match="expected one block"):
        report.publish(tmp_path, page)


@pytest.mark.parametrize(
    "page", ["speed", "cartpole_study", "blind_cliffwalk", "settings", "ray", "scale"]
)
def test_the_pages_that_commands_fill_have_one_block(page):
    text = (pages.DOCS / f"{page}.md").read_text()
    assert text.count(pages.BEGIN) == text.count(pages.END) == 1


@pytest.mark.parametrize(("name", "module"), [("ray", ray_shards), ("scale", scale_simulation)])
def test_the_pages_of_ray_are_those_of_the_results_that_are_kept(name, module):
    results = json.loads((pages.RESULTS / f"{name}.json").read_text())
    assert (pages.RESULTS / f"{name}.md").read_text() == module.page(results) + "\n"
    block = f"{pages.BEGIN}\n\n{module.published(results)}\n\n{pages.END}"
    assert block in (pages.DOCS / f"{name}.md").read_text()


def test_the_parts_and_the_rest_of_a_call_make_up_all_of_it(cases):
    rows = cases["profile"]["rows"]
    assert {row["contestant"] for row in rows} == {"sample", "update", "extend"}
    for call in profiles.CALLS:
        found = {row["part"]: row["median"] for row in rows if row["contestant"] == call}
        assert {profiles.WHOLE, profiles.REST} < found.keys()
        assert all(value > 0 for part, value in found.items() if part != profiles.REST)


def test_a_race_gives_every_entry_the_same_number_of_rounds():
    log = []
    parts = [
        Part("sample", lambda: log.append("s")),
        Part("update", lambda: log.append("u"), before=lambda: log.append("b")),
        Part("other", lambda: log.append("o"), summed=False),
    ]
    entries = [Entry({}, parts), Entry({}, [Part("sample", lambda: sum(range(10**5)))])]
    rounds, share = race(entries, 0.0)
    assert log[:4] == ["s", "b", "u", "o"]
    assert share > 0
    assert entries[0].rounds.keys() == {"sample", "update", "other", TOTAL}
    assert entries[1].rounds.keys() == {"sample"}
    assert {len(values) for e in entries for values in e.rounds.values()} == {rounds}


def test_ratios_are_of_medians_and_their_quartiles_of_rounds():
    assert vars(spread([1.0, 2.0, 3.0, 4.0, 5.0])) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    found = ratio([2.0, 4.0, 60.0], [1.0, 2.0, 3.0])
    assert vars(found) == {"median": 2.0, "q1": 2.0, "q3": 11.0}


def test_goals_compare_rows_and_give_reasons():
    goal = Goal("a / b", Ref("a", "x"), 0.5, Ref("b", "x"))
    case = Case("c", "", "", goals=(goal, Goal("size", Ref("a", "bytes"), 8.0)))
    entries = [Entry({"contestant": n}, [], rounds={"x": [v]}) for n, v in (("a", 1.0), ("b", 4.0))]
    rows = [{"contestant": "a", "part": "bytes", "median": 9.0, "unit": "bytes per slot"}]
    relative, absolute = judge(case, entries, rows)
    assert (relative["median"], relative["reached"]) == (0.25, True)
    assert not absolute["reached"]
    missing = judge(case, entries[:1], [{"contestant": "b", "part": None, "not_run": "no b"}])
    assert [goal["not_run"] for goal in missing] == ["b: no b", "a: not measured"]


def test_cases_have_names_of_their_own_and_known_contestants():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert set(case.contestants) <= CONTESTANTS.keys()
        small = quick(case)
        assert max(small.capacities, default=0) <= 10**5
        for goal, reduced in zip(case.goals, small.goals, strict=True):
            assert goal.text == reduced.text
            assert reduced.of.capacity in (None, *small.capacities)


def test_the_suggested_limit_is_the_largest_capacity_at_which_the_flat_method_wins():
    medians = {"tree": (5.0, 5.0, 5.0), "multinomial": (1.0, 4.0, 9.0)}
    rows = [
        {"contestant": name, "capacity": capacity, "median": value}
        for name, values in medians.items()
        for capacity, value in zip((10, 20_000, 300), values, strict=True)
    ]
    assert "multinomial up to 20,000 slots" in report.suggested_limit({"rows": rows})


# --------------------------------------------------------------------------- workload


def test_the_pool_hands_out_fresh_slots_until_all_are_used():
    pool = Pool(Point(100, 30), size=2**16)
    seen = [pool.next() for _ in range(2**16 // 30)]
    assert torch.equal(torch.cat([index for index, _ in seen]), pool.index[: len(seen) * 30])
    assert torch.equal(pool.next()[0], pool.index[:30])


def test_distance_tells_right_draws_from_wrong_ones_and_counts_impossible_ones():
    torch.manual_seed(0)
    capacity = 4_000
    mass = torch.rand(capacity)
    probability = expected(mass)
    assert math.isclose(float(probability.sum()), 1.0)
    right = distance(torch.multinomial(mass, 10**5, replacement=True), probability, capacity)
    wrong = distance(torch.randint(capacity, (10**5,)), probability, capacity)
    assert right["chi2_p"] > 1e-4
    assert 0.9 < right["tv"] / right["tv_perfect"] < 1.1
    assert wrong["chi2_p"] < 1e-12
    outside = distance(torch.tensor([0, capacity]), probability, capacity)
    assert outside["outside"] == 1
    assert outside["chi2_p"] == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_cases_run(tmp_path):
    path = main(["--quick", "--device", "cuda", "--only", "cuda", "--out", str(tmp_path)])
    cases = json.loads(path.read_text())["cases"]
    assert path.stem == "cuda-quick"
    assert {case["device"] for case in cases} == {"cuda"}
    assert all(case["rows"] for case in cases)
