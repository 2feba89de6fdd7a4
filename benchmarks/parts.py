"""Parts of a long run, each in a process of its own with a time limit of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.pages import number, table

NO_TIME, TIMED_OUT, PENDING = "not run: no time left", "timed out", "not reached yet"
TAIL = 40  # lines
GRACE = 3.0  # seconds for a process to say where it hangs


@dataclass(frozen=True)
class Part:
    """A command to run, and its share of the time.

    Attributes:
        name, title: for the results.
        command: what follows `python`; `{file}` stands for the JSON file in which it leaves what it
            found, `{seconds}` for four fifths of its time limit: it should be done by then.
        weight: its share of the time.
        least: seconds; with less than these left it is not begun.
    """

    name: str
    title: str
    command: tuple[str, ...]
    weight: float
    least: float = 20.0


def _wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Wait for it; its status, None where it goes on."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None


def _end(process: subprocess.Popen, grace: float) -> None:
    """End a process and all that it started; Python first prints where it was."""
    process.send_signal(signal.SIGABRT)  # to nobody where it has ended
    _wait(process, grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _wait(process, grace)


def _run(command: list[str], limit: float, log: Path, env: Mapping[str, str]) -> str:
    """Run a command for at most `limit` seconds, its end included; returns its state."""
    grace = min(GRACE, limit / 8)
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**env, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = _wait(process, limit - 2 * grace)
        finally:
            _end(process, grace)
    if status is None:
        return TIMED_OUT
    if status < 0:
        return f"failed: {signal.Signals(-status).name}"
    return "ok" if status == 0 else "failed"


def _left(file: Path) -> dict:
    """Read what a part left behind, also where it did not come to its end."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def run_all(
    parts: Sequence[Part],
    seconds: float,
    folder: Path,
    save: Callable[[list[dict]], None],
    env: Mapping[str, str] = os.environ,
) -> list[dict]:
    """Run one after the other within `seconds`; `save` is called after each.

    Each may take its share, by weight, of the time left then: what one does not use goes to those
    after it.

    Args:
        parts: in order of importance.
        seconds: for all of them.
        folder: for their output.
        save: takes the records so far, those of parts that are to come among them.
        env: the environment of the processes.

    Returns:
        A record of each: name, title, state ("ok", "failed", with the signal where there was one,
        `TIMED_OUT`, `NO_TIME`), seconds, limit, the last lines of what it printed unless it is ok,
        and what it left in its file as "found".
    """
    end = time.monotonic() + seconds
    records: list[dict] = [
        {"name": p.name, "title": p.title, "state": PENDING, "seconds": 0.0, "found": {}}
        for p in parts
    ]
    for i, (part, record) in enumerate(zip(parts, records, strict=True)):
        left = end - time.monotonic()
        share = left * part.weight / sum(p.weight for p in parts[i:])
        limit = min(left, max(part.least, share))
        if left < part.least:
            record["state"] = NO_TIME
        else:
            said = f"up to {limit:.0f} s"
            print(f"[{i + 1}/{len(parts)}] {part.name}: {said} ...", file=sys.stderr, flush=True)
            file, log = folder / f"{part.name}.json", folder / f"{part.name}.log"
            values = {"{file}": str(file), "{seconds}": f"{0.8 * limit:.1f}"}
            command = [sys.executable, *(values.get(word, word) for word in part.command)]
            start = time.monotonic()
            record["state"] = _run(command, limit, log, env)
            record["seconds"] = round(time.monotonic() - start, 1)
            record |= {"limit": round(limit, 1), "found": _left(file)}
            if record["state"] != "ok":
                lines = log.read_text(errors="replace").splitlines()
                record["output"] = "\n".join(lines[-TAIL:])
        print(f"{part.name}: {record['state']}", file=sys.stderr, flush=True)
        save(records)
    return records


def _counts(tests: dict) -> str:
    failed = len(tests["failures"])
    words = [f"{tests['passed']} passed", f"{failed} failed", f"{tests['skipped']} skipped"]
    if not tests["finished"]:
        words.append(f"of {tests['selected']}; running: {tests['running']}")
    if tests["not_collected"]:
        files = [f"{f['file']} ({f['reason']})" for f in tests["not_collected"]]
        words.append(f"not collected: {'; '.join(files)}")
    return ", ".join(words)


def detail(record: dict) -> str:
    """Say in a line what a part found."""
    found = record["found"]
    if "selected" in found:
        return _counts(found)
    if "device" in found:
        return ", ".join(f"{key} {value}" for key, value in found["device"].items())
    if "case" in found:
        case = found["case"]
        return case.get("not_run", f"{len(case['rows'])} rows")
    return ""


def _failures(record: dict) -> list[str]:
    said = [record.get("output", "")]
    failures = record["found"].get("failures", [])
    said += [f"{f['test']} ({f['when']})\n{f['output']}" for f in failures if f["output"]]
    return [f"{record['name']}:\n\n```\n{lines}\n```" for lines in said if lines]


def text(records: list[dict]) -> str:
    """Say of each part how it went, and what those printed that failed."""
    body = [
        [
            record["name"],
            record["state"],
            number(record["seconds"]),
            number(record["limit"]) if "limit" in record else "",
            record["detail"].replace("|", "\\|"),
        ]
        for record in records
    ]
    shown = table(["part", "state", "seconds", "limit", "what"], body)
    said = [block for record in records for block in _failures(record)]
    return "\n\n".join([shown, *(["### What failed", *said] if said else [])])
