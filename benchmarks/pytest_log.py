"""A plugin for pytest that keeps a JSON file of what happened so far.

`pytest -p benchmarks.pytest_log --log-json FILE`: also a run that is killed leaves its counts,
the failures, and the name of the test that was running.
"""

import json
import os
from pathlib import Path
from typing import Any

MOST_LINES, MOST_OUTPUTS = 30, 20  # of a failure; of all of them: one fault may fail hundreds


class Log:
    """The hooks.

    A file that cannot be collected because a module is missing is written down, and is no failure;
    a run in which no test passes is one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {
            "selected": None,
            "passed": 0,
            "skipped": 0,
            "failures": [],
            "not_collected": [],
            "running": None,
            "finished": False,
        }

    def _save(self) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(json.dumps(self.found))
        os.replace(new, self.path)

    def pytest_collectreport(self, report: Any) -> None:
        """Note what could not be collected."""
        if report.failed:
            lines = str(report.longrepr).splitlines()
            errors = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
            reason = errors[-1] if errors else lines[-1]
            self.found["not_collected"].append({"file": report.nodeid, "reason": reason})

    def pytest_collection_finish(self, session: Any) -> None:
        """Note how many there are."""
        self.found["selected"] = len(session.items)
        self._save()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Note which one begins."""
        self.found["running"] = nodeid
        self._save()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count it."""
        if report.failed:
            failures = self.found["failures"]
            failure = {"test": report.nodeid, "when": report.when, "output": ""}
            if len(failures) < MOST_OUTPUTS:
                tail = str(report.longrepr).splitlines()[-MOST_LINES:]
                failure["output"] = "\n".join(tail)
            failures.append(failure)
        elif report.skipped:
            self.found["skipped"] += 1
        elif report.when == "call":
            self.found["passed"] += 1

    def pytest_sessionfinish(self, session: Any) -> None:
        """Settle how the process ends."""
        broken = [
            f for f in self.found["not_collected"] if "ModuleNotFoundError" not in f["reason"]
        ]
        self.found |= {"running": None, "finished": True}
        self._save()
        failed = self.found["failures"] or broken or not self.found["passed"]
        session.exitstatus = 1 if failed else 0


def pytest_addoption(parser: Any) -> None:
    """Add where to write."""
    parser.addoption("--log-json", type=Path, required=True, help="a file for what happened")


def pytest_configure(config: Any) -> None:
    """Begin."""
    config.pluginmanager.register(Log(config.getoption("--log-json")))
