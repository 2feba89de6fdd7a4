"""Results as Markdown."""

__all__ = ["case_text", "goals_table", "header", "markdown_table", "number"]

NOT_RUN = "not run"


def number(value: float) -> str:
    """Three significant digits, thousands separated."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 10 else f"{value:.1f}"


def size(value: float) -> str:
    """10^5 for powers of ten, else the number."""
    text = f"{value:,}"
    power = len(str(value)) - 1
    return f"10^{power}" if power >= 4 and value == 10**power else text


def markdown_table(head: list[str], body: list[list[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(row: dict) -> str:
    if "median" not in row:
        return f"{NOT_RUN}: {row['not_run']}"
    if "q1" not in row:
        return f"{number(row['median'])}"
    return f"{number(row['median'])} ({number(row['q1'])} to {number(row['q3'])})"


def _limit(goal: dict) -> str:
    return f"at most {number(goal['limit'])}"


def _found(goal: dict) -> tuple[str, str]:
    if "not_run" in goal:
        return f"{NOT_RUN}: {goal['not_run']}", ""
    found = number(goal["median"])
    if goal["relative"]:
        found += f" ({number(goal['q1'])} to {number(goal['q3'])})"
    if goal["reached"]:
        return found, "reached"
    off = goal["median"] / goal["limit"] if goal["limit"] else goal["median"]
    return found, f"not reached: {number(off)} times the limit"


def goals_table(cases: list[dict]) -> str:
    """All goals: limit, what was measured, and whether that is enough."""
    goals = [goal for case in cases for goal in case.get("goals", [])]
    body = [[goal["text"], _limit(goal), *_found(goal)] for goal in goals]
    return markdown_table(["goal", "limit", "measured", ""], body) if body else ""


def header(results: dict) -> str:
    """Where the numbers come from."""
    machine, commit = results["machine"], results["commit"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    on = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    dirty = " with uncommitted changes" if commit["dirty"] else ""
    lines = [
        f"`{results['command']}`",
        "",
        f"- machine: {on}; GPU: {machine['gpu'] or 'none'}; threads used: "
        f"{machine['threads_used']}; load before the run: {machine['load_before']}",
        f"- versions: {versions}",
        f"- commit: {commit['hash']}{dirty}",
        f"- date: {results['date']}; seed: {results['seed']}; took {number(results['seconds'])} s",
    ]
    if results["quick"]:
        lines += ["", "**A quick run at tiny sizes: it shows that the benchmarks run, no more.**"]
    return "\n".join(lines)


def _values(rows: list[dict], key: str) -> list:
    return list(dict.fromkeys(row[key] for row in rows if row.get(key) is not None))


def _label(row: dict, keys: list[str], *, part: bool) -> str:
    words = [row["contestant"]]
    words += [
        f"batch {size(row[key])}" if key == "batch" else f"{row[key]} transitions" for key in keys
    ]
    if part and row["part"] is not None:
        words.append(row["part"])
    return ", ".join(words)


def _by_part(rows: list[dict], extra: list[str]) -> str:
    timed = [row for row in rows if row.get("unit", "us") in ("us", "ms")]
    unit = next((row["unit"] for row in timed if "unit" in row), "us")
    parts = _values(timed, "part")
    lines: dict[str, dict[str | None, dict]] = {}
    for row in timed:
        lines.setdefault(_label(row, extra, part=False), {})[row["part"]] = row
    body = []
    for label, cells in lines.items():
        if None in cells:
            body.append([label, _cell(cells[None]), *[""] * (len(parts) - 1)])
        else:
            body.append([label, *(_cell(cells[p]) if p in cells else "" for p in parts)])
    return markdown_table([unit, *(parts or [""])], body)


def _by_axis(rows: list[dict], axis: str, extra: list[str]) -> str:
    values = _values(rows, axis)
    lines: dict[str, dict[int, str]] = {}
    reasons: dict[str, None] = {}
    for row in rows:
        if row.get("not_run"):
            reasons[f"{row['contestant']}, {size(row[axis])}: {row['not_run']}"] = None
            timed = [r for r in rows if r["contestant"] == row["contestant"] and r["part"]]
            if not timed:
                lines.setdefault(row["contestant"], {})[row[axis]] = NOT_RUN
            continue
        unit = "" if row["unit"] == "us" else f" ({row['unit']})"
        lines.setdefault(_label(row, extra, part=True) + unit, {})[row[axis]] = _cell(row)
    body = [
        [label, *(cells.get(value, NOT_RUN) for value in values)] for label, cells in lines.items()
    ]
    table = markdown_table([f"us by {axis}", *map(size, values)], body)
    return "\n".join([table, *(f"\nNot run: {reason}." for reason in reasons)])


def _exactness(rows: list[dict]) -> str:
    body = []
    for row in rows:
        left = [row["contestant"], size(row["capacity"]), row["masses"]]
        if "not_run" in row:
            body.append([*left, f"{NOT_RUN}: {row['not_run']}", "", "", "", ""])
            continue
        ratio = number(row["tv"] / row["tv_perfect"])
        chance = f"{row['chi2_p']:.2g}" if row["chi2_p"] >= 1e-12 else "0"
        body.append(
            [
                *left,
                f"{row['tv']:.5f}",
                f"{row['tv_perfect']:.5f}",
                ratio,
                chance,
                str(row["outside"]),
            ]
        )
    head = [
        "method",
        "slots",
        "masses",
        "distance",
        "of perfect draws",
        "ratio",
        "chi-square p",
        "outside",
    ]
    return markdown_table(head, body)


def _profile(rows: list[dict]) -> str:
    body = [[row["contestant"], row["part"], _cell(row)] for row in rows]
    return markdown_table(["call", "part", "us"], body)


def suggested_limit(case: dict, tree_name: str = "tree", other: str = "multinomial") -> str:
    """Up to which capacity `other` beats the tree, by what was measured."""
    medians: dict[str, dict[int, float]] = {}
    for row in case["rows"]:
        if row.get("median") is not None:
            medians.setdefault(row["contestant"], {})[row["capacity"]] = row["median"]
    tree, flat = medians.get(tree_name, {}), medians.get(other, {})
    wins = [capacity for capacity in tree if capacity in flat and flat[capacity] < tree[capacity]]
    found = f"up to {size(max(wins))} slots" if wins else "nowhere"
    return f'Suggested for `method="auto"`: {other} {found}, the {tree_name} elsewhere.'


def _noise(case: dict) -> str:
    share = case.get("core_share")
    if share is None or share > 0.95 or case["device"] == "cuda":
        return ""
    return f" **Noisy: the process had only {100 * share:.0f}% of a core.**"


def case_text(case: dict) -> str:
    """A section: title, what it is, the table, footnotes."""
    lines = [f"## {case['title']}", "", case["about"], ""]
    rows = case["rows"]
    if "not_run" in case:
        return "\n".join([*lines, f"{NOT_RUN}: {case['not_run']}."])
    if case["kind"] == "exactness":
        lines.append(_exactness(rows))
    elif case["kind"] == "profile":
        lines.append(_profile(rows))
    else:
        several = [key for key in ("capacity", "batch") if len(_values(rows, key)) > 1]
        extra = ["schema"] if len(_values(rows, "schema")) > 1 else []
        if several:
            axis, *rest = several
            lines.append(_by_axis(rows, axis, extra + rest))
        else:
            lines.append(_by_part(rows, extra))
    for name, note in case.get("notes", {}).items():
        lines += ["", f"{name}: {note}."]
    if case["name"].startswith("methods"):
        lines += ["", suggested_limit(case), "", suggested_limit(case, "tree, plain torch")]
    if case.get("rounds"):
        lines += ["", f"Medians (and quartiles) of {case['rounds']} rounds." + _noise(case)]
    return "\n".join(lines)
