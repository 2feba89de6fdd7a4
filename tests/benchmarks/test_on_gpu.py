"""The command for a machine with a GPU: what fails, hangs or has no time left costs only itself."""

import contextlib
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import on_gpu
from benchmarks.case import NO_SLOT, RATIO, Case
from benchmarks.cases import CASES
from benchmarks.contestants import CONTESTANTS, Contestant
from benchmarks.exactness import worst
from benchmarks.goals import judge
from benchmarks.parts import NO_TIME, PENDING, TIMED_OUT, Part, run_all
from benchmarks.runner import Options, run
from tests.support.parameters import slow_but

WRITES = "import sys, json; json.dump({'case': {'rows': [1, 2]}}, open(sys.argv[1], 'w'));"


def part(name, code, least=0.0, weight=1.0):
    return Part(name, name, ("-c", code, "{file}"), weight, least)


# --------------------------------------------------------------------------- parts


def test_a_part_that_fails_or_crashes_or_hangs_costs_only_itself_and_says_where(tmp_path):
    states = []
    many = "print('\\n'.join(map(str, range(1000))));"
    parts = [
        part("good", WRITES),
        part("bad", f"{many} raise ValueError('no such thing')"),
        part("crash", "import os; os.kill(os.getpid(), 11)"),
        part("hang", f"{WRITES} import time\ndef waiting(): time.sleep(99)\nwaiting()", 0.0, 0.1),
        part("last", WRITES),
    ]
    start = time.monotonic()
    _, failed, _, hung, _ = run_all(
        parts, 20.0, tmp_path, lambda records: states.append([r["state"] for r in records])
    )
    assert time.monotonic() - start < 21
    ends = ["ok", "failed", "failed: SIGSEGV", TIMED_OUT, "ok"]
    assert states == [ends[: n + 1] + [PENDING] * (4 - n) for n in range(5)]
    assert hung["found"] == {"case": {"rows": [1, 2]}}
    assert "in waiting" in hung["output"]  # where it was
    assert failed["found"] == {}
    assert failed["output"].endswith("ValueError: no such thing")
    assert len(failed["output"].splitlines()) <= 40


def test_what_a_part_has_started_ends_with_it(tmp_path):
    child = "import time; time.sleep(99)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]);"
    code += "open(sys.argv[1], 'w').write(str(p.pid)); p.wait()"
    run_all([part("parent", code)], 2.0, tmp_path, lambda _: None)
    stat = Path(f"/proc/{(tmp_path / 'parent.json').read_text()}/stat")
    deadline = time.monotonic() + 60
    with contextlib.suppress(OSError):  # it is gone altogether
        while stat.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_part_for_which_no_time_is_left_is_not_begun(tmp_path):
    parts = [part("first", WRITES), part("long", WRITES, least=100.0), part("last", WRITES)]
    records = run_all(parts, 50.0, tmp_path, lambda _: None)
    assert [record["state"] for record in records] == ["ok", NO_TIME, "ok"]
    assert not (tmp_path / "long.json").exists()


def test_the_time_that_one_does_not_use_goes_to_those_after_it(tmp_path):
    records = run_all([part("a", ""), part("b", "", 0.0, 3.0)], 80.0, tmp_path, lambda _: None)
    assert records[0]["limit"] == 20.0
    assert 60.0 < records[1]["limit"] <= 80.0


# --------------------------------------------------------------------------- results


def records_of(states):
    return [
        {"name": p.name, "title": p.title, "seconds": 1.0, "state": PENDING, "found": {}}
        | states.get(p.name, {})
        for p in on_gpu.plan(rehearse=True)
    ]


ABOUT = {"name": "cuda-quick", "command": "x", "date": "x", "seed": 0, "quick": True, "seconds": 1}


def test_the_results_name_every_part_and_every_goal_however_it_ended(tmp_path):
    tests = {"selected": 9, "passed": 3, "skipped": 1, "finished": False, "running": "t.py::hangs"}
    tests["failures"] = [{"test": "t.py::bad", "when": "call", "output": "assert 1 == 2"}]
    tests["not_collected"] = [{"file": "u.py", "reason": "ModuleNotFoundError: no scipy"}]
    extend = next(case for case in CASES if case.name == "cuda-extend")
    row = {"contestant": "per_td, eager", "batch": 4096, "capacity": 10**6, "schema": "standard"}
    timed = row | {"part": "extend", "median": 60.0, "q1": 50.0, "q3": 70.0, "unit": "us"}
    rows = [timed, row | {"part": "host syncs of extend", "median": 0.0, "unit": "in an extend"}]
    case = run(extend, Options("cpu")) | {"rows": rows, "goals": judge(extend, [], rows)}
    del case["not_run"]
    states = {
        "tests-kernels": {"state": TIMED_OUT, "found": tests, "output": "File kernel.py, line 3"},
        "cuda-capacity": {"state": "failed: SIGSEGV", "output": "Segmentation fault"},
        "cuda-extend": {"state": "ok", "found": {"case": case}},
        "cuda-batch": {"state": NO_TIME},
    }
    path = tmp_path / "cuda-quick.json"
    on_gpu.save(path, on_gpu.collected(records_of(states), ABOUT))
    results = json.loads(path.read_text())
    assert [part["name"] for part in results["parts"]] == [
        p.name for p in on_gpu.plan(rehearse=True)
    ]
    page = path.with_suffix(".md").read_text()
    for case in CASES:
        if case.device == "cuda":
            assert all(goal.text in page for goal in case.goals)
    goals = {g["text"]: g for case in results["cases"] for g in case["goals"]}
    extend_us = goals["CUDA: us for `extend` of 4,096 rows"]
    assert (extend_us["median"], extend_us["limit"], extend_us["reached"]) == (60.0, 50.0, False)
    assert goals["CUDA: host syncs in `extend` of 4,096 rows"]["reached"]
    assert goals["CUDA: host syncs in an eager step"]["not_run"] == "failed: SIGSEGV"
    assert "not reached: 1.2 times the limit" in page
    assert "3 passed, 1 failed, 1 skipped, of 9; running: t.py::hangs" in page
    assert "not collected: u.py (ModuleNotFoundError: no scipy)" in page
    for said in ("assert 1 == 2", "File kernel.py, line 3", "Segmentation fault", NO_TIME, PENDING):
        assert said in page


def test_every_case_for_cuda_is_a_part():
    names = [part.name for part in on_gpu.plan(rehearse=False)]
    assert {case.name for case in CASES if case.device == "cuda"} == set(names[3:])


def test_exactness_is_judged_by_the_worst_of_its_masses():
    row = {"contestant": "per_td: tree", "capacity": 10**8, "tv_perfect": 1.0, "outside": 0}
    rows = [row | {"tv": 1.01}, row | {"tv": 1.3}, {"contestant": "other", "not_run": "no"}]
    assert {r["part"]: r["median"] for r in worst(rows)} == {RATIO: 1.3, NO_SLOT: 0.0}
    case = next(case for case in CASES if case.name == "cuda-exactness")
    far, nowhere = judge(case, [], worst(rows))
    assert not far["reached"]
    assert nowhere["reached"]


def test_rounds_end_when_the_time_is_up():
    case = Case("c", "", "", contestants=("per_td",), capacities=(100,), batches=(10,), seconds=60)
    start = time.perf_counter()
    record = run(case, Options(until=start))
    assert time.perf_counter() - start < 30
    assert record["rounds"] >= 7


def test_a_peer_that_fails_leaves_the_others(monkeypatch, capsys):
    class Failing(Contestant):
        name, peer = "failing", True

        def sample(self):
            raise RuntimeError("not today")

    monkeypatch.setitem(CONTESTANTS, "failing", Failing)
    case = Case("c", "", "", contestants=("failing", "per_td"), capacities=(100,), batches=(10,))
    record = run(replace(case, seconds=0.0), Options(peers=True))
    assert "not_run" not in record
    reasons = {row["contestant"]: row.get("not_run") for row in record["rows"]}
    assert reasons == {"failing": "it fails (RuntimeError: not today)", "per_td": None}


# --------------------------------------------------------------------------- tests within tests

TESTS = """
import os, pytest
def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip
def test_skipped(): pass
def test_crashes(): {code}
"""


def pytest_part(folder, code):
    (folder / "test_it.py").write_text(TESTS.format(code=code))
    (folder / "test_other.py").write_text("import no_such_module")
    (folder / "pytest.ini").write_text("[pytest]")
    return Part("tests", "", (*on_gpu.PYTEST, "--rootdir", str(folder), str(folder)), 1.0, 0.0)


@pytest.mark.parametrize("ends", slow_but([False], [True, False]))
def test_tests_are_counted_also_when_one_crashes_or_cannot_be_collected(tmp_path, ends):
    one = pytest_part(tmp_path, "pass" if ends else "os.kill(os.getpid(), 9)")
    (record,) = run_all([one], 60.0, tmp_path, lambda _: None)
    found = record["found"]
    assert record["state"] == ("failed" if ends else "failed: SIGKILL")
    assert (found["passed"], found["skipped"], found["finished"]) == (1 + ends, 1, ends)
    assert found["running"] == (None if ends else "test_it.py::test_crashes")
    (failure,) = found["failures"]
    assert failure["test"] == "test_it.py::test_bad"
    assert "assert 1 == 2" in failure["output"]
    missing = "ModuleNotFoundError: No module named 'no_such_module'"
    assert found["not_collected"] == [{"file": "test_other.py", "reason": missing}]


def test_a_part_that_only_lacks_a_module_is_no_failure(tmp_path):
    one = pytest_part(tmp_path, "pass")
    (tmp_path / "test_it.py").write_text("def test_good(): pass")
    (record,) = run_all([one], 60.0, tmp_path, lambda _: None)
    assert record["state"] == "ok"
    (tmp_path / "test_it.py").unlink()
    (record,) = run_all([one], 60.0, tmp_path, lambda _: None)
    assert record["state"] == "failed"  # nothing passed


# --------------------------------------------------------------------------- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path, capsys):
    assert on_gpu.main(["--out", str(tmp_path)]) != 0
    no_device = "on_gpu: no CUDA device here; --rehearse runs it without one\n"
    assert capsys.readouterr() == ("", no_device)
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_without_time_leaves_results_that_say_so(tmp_path, capsys):
    assert on_gpu.main(["--rehearse", "0.01", "--out", str(tmp_path)]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"cuda-quick.json", "cuda-quick.md"}
    results = json.loads((tmp_path / "cuda-quick.json").read_text())
    assert {part["state"] for part in results["parts"]} == {NO_TIME}
    assert NO_TIME in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_must_be_a_length_of_time(minutes, capsys):
    with pytest.raises(SystemExit):
        on_gpu.parse(["--out=x", "--", minutes])
    assert "minutes: expected a positive number" in capsys.readouterr().err
