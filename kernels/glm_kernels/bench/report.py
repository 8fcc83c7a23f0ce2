"""Tables of what was measured, between the markers <!-- begin benchmark --> and <!-- end benchmark --> of a document.

A miss of a goal stands beside the goal. What bounds it, and what was tried without gain, is not measured but found
out: remarks.toml beside the results holds it, a [[remark]] each with `device`, `case` (patterns as in file names, where
a case is written as "attention GLM-4-9B causal ×1 T=8192") and `text`; a miss without a remark says so.
"""

import fnmatch
import os
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_kernels.bench.goals import GOALS, Goal, goals_of, seconds
from glm_kernels.bench.machine import save_text
from glm_kernels.bench.peers import OURS
from glm_kernels.bench.results import Results, Row, read_all
from glm_kernels.bench.subject import Work

BLOCK = "benchmark"
COMMAND = "python -m glm_kernels.bench all --out kernels/results/"
STATES = {"goal": "goal", "accepted": "at first", "miss": "**miss**"}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first column left-aligned."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def rewritten(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """`text` with every block between <!-- begin NAME --> and <!-- end NAME --> written anew.

    Raises:
        KeyError: A block that nobody writes.
    """

    def block(match: re.Match[str]) -> str:
        return f"<!-- begin {match[1]} -->\n{blocks[match[1]]()}\n<!-- end {match[1]} -->"

    return re.sub(r"<!-- begin ([\w-]+) -->\n.*?<!-- end \1 -->", block, text, flags=re.S)


def write(document: Path, folder: Path) -> bool:
    """Write the block in `document` anew, if it has one."""
    before = document.read_text(encoding="utf-8")
    if f"<!-- begin {BLOCK} -->" not in before:
        return False
    others = {name: keep(before, name) for name in re.findall(r"<!-- begin ([\w-]+) -->", before)}
    save_text(document, rewritten(before, others | {BLOCK: lambda: markdown(folder, document.parent)}))
    return True


def keep(text: str, name: str) -> Callable[[], str]:
    """What stands in a block already."""
    found = re.search(rf"<!-- begin {name} -->\n(.*?)\n?<!-- end {name} -->", text, flags=re.S)
    return lambda: found[1] if found else ""


def markdown(folder: Path, place: Path) -> str:
    """The whole block, from all devices in `folder`, for a document in the folder `place`."""
    devices = read_all(folder)
    if not devices:
        head = ["what", "cases", "goal", "at first", "measured"]
        rows = [[name_of(goal), goal.cases, *levels(goal), "not yet"] for goal in GOALS]
        return (
            "Not yet measured: no GPU was at hand. One command measures everything on the GPU it finds, writes a file "
            f"for it into `results/`, and tables and plots in place of this paragraph:\n\n    {COMMAND}\n\n"
            f"What is aimed at:\n\n{table(head, rows)}"
        )
    remarks = read_remarks(folder)
    return "\n\n".join(part for device in devices for part in sections(device, remarks, folder, place))


def sections(results: Results, remarks: list[dict[str, str]], folder: Path, place: Path) -> list[str]:
    """Of one device: where from, goals, misses, and a table and a plot for each subject."""
    found = [f"### {results.device['device']}", source(results), table(GOAL_HEAD, goal_rows(results))]
    if missed := misses(results, remarks):
        found.append("Misses, with what bounds them:\n\n" + "\n".join(f"- {line}" for line in missed))
    for subject in dict.fromkeys(row["subject"] for row in results.rows):
        rows = [row for row in results.rows if row["subject"] == subject]
        found.append(f"#### {subject.capitalize()}")
        picture = folder / f"{results.name}-{subject}.png"
        if picture.exists():
            found.append(f"![{subject}: percent of the roof]({os.path.relpath(picture, place)})")
        count = f"{len(rows)} case{'s' * (len(rows) != 1)}"
        inside = f"{subject_table(rows, results)}\n\n{reasons(rows)}".strip()
        found.append(f"<details><summary>{count}</summary>\n\n{inside}\n\n</details>")
    return found


def source(results: Results) -> str:
    """Where the figures come from, run by run."""
    lines = []
    for run in results.runs:
        count = sum(row["run"] == run["id"] for row in results.rows)
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        clock = "".join(
            f", {name} {low:.0f}–{high:.0f} {unit}"
            for name, unit in (("clocks.sm", "MHz"), ("clocks.mem", "MHz"), ("power.draw", "W"))
            for low, _, high in [run["clocks"].get(name, (0, 0, 0))]
            if high
        )
        lines.append(
            f"{count} case{'s' * (count != 1)} of {run['date']}, commit {run['commit']}: R = "
            f"{run['roofs']['read'] / 1e12:.2f} TB/s, C = {run['roofs']['multiply'] / 1e12:.0f} TFLOP/s, "
            f"driver {run.get('driver', 'unknown')}, {versions}{clock}."
        )
    return (
        "R is the rate of a stream that only reads, C that of a bf16 matrix product of 8192³, both measured in the "
        "run. Sides in turn in one process, CUDA graphs, inputs rotated through more than the cache, medians; ± is "
        f"half of the way from the tenth to the ninetieth percentile. Written by `{COMMAND}`.\n\n"
        + "\n".join(f"- {line}" for line in lines)
    )


# ----------------------------------------------------------------------------- goals


def name_of(goal: Goal) -> str:
    """As "attention against SDPA cuDNN"."""
    return f"{goal.subject} against {goal.against}" if goal.against else f"{goal.subject}, time"


def levels(goal: Goal) -> list[str]:
    """Goal, and what is accepted at first."""
    accept = "–" if goal.accept is None else f"{goal.sign} {goal.written(goal.accept)}"
    return [f"{goal.sign} {goal.written(goal.goal)}", accept]


GOAL_HEAD = ["what", "cases", "goal", "at first", "measured", "how many cases reach what"]


def goal_rows(results: Results) -> list[list[str]]:
    """Every goal with its worst and best case, and how many reach it; the columns of GOAL_HEAD."""
    rows = []
    for goal in GOALS:
        covered = [row for row in results.rows if goal in goals_of(row)]
        values = sorted(value for row in covered if (value := goal.value(row, results)) is not None)
        states = [goal.verdict(value) for value in values]
        measured = "not measured" if not values else f"{goal.written(values[0])} … {goal.written(values[-1])}"
        if len(values) == 1:
            measured = goal.written(values[0])
        without = f", {len(covered) - len(values)} without a figure" if len(covered) > len(values) else ""
        counts = ", ".join(f"{states.count(state)} {word}" for state, word in STATES.items() if state in states)
        rows.append([name_of(goal), goal.cases, *levels(goal), measured, (counts + without).strip(", ") or "–"])
    return rows


def case_name(row: Row) -> str:
    """As remarks name it."""
    return f"{row['subject']} {row['label']} {row['axis'][0]}={row['axis'][1]}"


def misses(results: Results, remarks: list[dict[str, str]]) -> list[str]:
    """A line for every case that misses what is accepted at first, or the goal where nothing less is accepted."""
    lines = []
    for row in results.rows:
        for goal in goals_of(row):
            value = goal.value(row, results)
            if value is None or goal.verdict(value) != "miss":
                continue
            said = [each["text"] for each in remarks if matches(each, results, row)]
            least = goal.goal if goal.accept is None else goal.accept
            against = f" of {goal.against}" if len(goal.against) > 1 else ""
            lines.append(
                f"{case_name(row)}: {goal.written(value)}{against}, {goal.sign} {goal.written(least)} wanted. "
                f"{' '.join(said) or 'Not yet explained.'}"
            )
    return lines


def matches(remark: dict[str, str], results: Results, row: Row) -> bool:
    """Whether a remark is about a row."""
    return fnmatch.fnmatchcase(results.device["device"], remark.get("device", "*")) and fnmatch.fnmatchcase(
        case_name(row), remark["case"]
    )


def read_remarks(folder: Path) -> list[dict[str, str]]:
    """Those of remarks.toml, if there is one."""
    path = folder / "remarks.toml"
    return tomllib.loads(path.read_text(encoding="utf-8")).get("remark", []) if path.exists() else []


# ----------------------------------------------------------------------------- tables


def roof(row: Row, results: Results, side: str = OURS) -> tuple[float, str] | None:
    """The part of the roof that a side reaches, and which roof it is."""
    taken = seconds(row, side)
    if taken is None:
        return None
    roofs = results.run_of(row)["roofs"]
    floor, bound = Work(row["bytes"], row["flops"]).floor(roofs["read"], roofs["multiply"])
    return floor / taken, bound


def time(value: float) -> str:
    """In the unit that suits."""
    return f"{value * 1e6:.1f} µs" if value < 1e-3 else f"{value * 1e3:.2f} ms"


def subject_table(rows: Sequence[Row], results: Results) -> str:
    """A line a case: time, rate, part of the roof, times as fast as each peer, goals."""
    peers = list(dict.fromkeys(name for row in rows for name in row.get("sides", {}) if name != OURS))
    lines = [
        [row["label"], f"{row['axis'][0]}={row['axis'][1]}", *figure(row, results)]
        + [against(row, name) for name in peers]
        + [goal_cell(row, results)]
        for row in sorted(rows, key=lambda row: (row["label"], row["axis"][1]))
    ]
    head = ["case", "size", "time", "rate", "of roof", *(f"× {name}" for name in peers), "goals"]
    return table(head, lines)


def figure(row: Row, results: Results) -> list[str]:
    """Time, rate and part of the roof; or why there is no figure."""
    if "skipped" in row:
        return [f"skipped: {row['skipped']}", "–", "–"]
    mine = row["sides"].get(OURS, {"missing": "not measured"})
    found = roof(row, results)
    if found is None:
        failed = "refused" in mine
        return [f"**no figure, its check failed**: {mine['refused']}" if failed else why(mine), "–", "–"]
    part, bound = found
    rate = (
        f"{row['bytes'] / mine['seconds'] / 1e12:.2f} TB/s"
        if bound == "R"
        else f"{row['flops'] / mine['seconds'] / 1e12:.0f} TFLOP/s"
    )
    spread = 50 * (mine["high"] - mine["low"]) / mine["seconds"]
    marks = ("" if mine["mode"] == "graph" else f" ({mine['mode']})") + (" (in cache)" if mine["in cache"] else "")
    return [f"{time(mine['seconds'])} ± {spread:.1f} %{marks}", rate, f"{100 * part:.0f} % {bound}"]


def why(side: Mapping[str, Any]) -> str:
    """Why a side has no figure."""
    return next((f"{word}: {side[word]}" for word in ("refused", "failed", "missing") if word in side), "–")


def against(row: Row, name: str) -> str:
    """How many times as fast as a peer ours is."""
    mine, theirs = seconds(row), seconds(row, name)
    if theirs is None:
        state = row.get("sides", {}).get(name, {})
        return next((word for word in ("refused", "failed") if word in state), "–")
    return time(theirs) if mine is None else f"{theirs / mine:.2f}"


def goal_cell(row: Row, results: Results) -> str:
    """Every goal of a case: value, and what it reaches."""
    cells = []
    for goal in goals_of(row):
        value = goal.value(row, results)
        against = f" of {goal.against}" if len(goal.against) > 1 else ""
        if value is None:
            cells.append(f"{goal.sign} {goal.written(goal.goal)}{against}: no figure")
            continue
        state, accept = STATES[goal.verdict(value)], ""
        if goal.verdict(value) != "goal":
            accept = f", at first {goal.accept:g}" if goal.accept is not None else ""
            accept = f" (goal {goal.goal:g}{accept})"
        cells.append(f"{goal.written(value)}{against}: {state}{accept}")
    return "; ".join(cells) or "–"


def reasons(rows: Sequence[Row]) -> str:
    """Why peers have no figure, each reason once."""
    said: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        for name, side in row.get("sides", {}).items():
            if name != OURS and "seconds" not in side:
                said[name][why(side)] += 1
    lines = [
        f"- {name}: " + "; ".join(f"{reason} ({count})" for reason, count in found.items())
        for name, found in said.items()
    ]
    return "Without a figure (in so many cases):\n\n" + "\n".join(lines) if lines else ""
