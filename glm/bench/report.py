"""Tables of what was measured, for the terminal and for documents, between <!-- begin runtime --> and its end.

A miss of a goal stands beside the goal. What bounds it, and what was tried, is written into remarks.toml beside the
results, as for kernels; a case is called "decode glm-4-9b int4 ×1 context=1024" there.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_kernels.bench.report import STATES, matches, read_remarks, table

from glm.bench.goals import GOALS, OURS, Goal, fraction, goals_of, of_matmul, seconds, speed
from glm.bench.results import Row, RuntimeResults, read_all

BLOCK, GOALS_BLOCK = "runtime", "runtime-goals"
COMMAND = "glm bench all --out kernels/results/"
KERNELS = 12  # lines of a table of kernels


def markdown(folder: Path, place: Path) -> str:
    """Everything, from all devices in `folder`, for a document in the folder `place`."""
    devices = read_all(folder)
    if not devices:
        return f"{goals_markdown(folder)}\n\nOne command measures all of it on the GPU it finds:\n\n    {COMMAND}"
    return "\n\n".join(part for device in devices for part in sections(device, folder, place))


def goals_markdown(folder: Path) -> str:
    """The goals of every device, or that nothing is measured yet, with what is aimed at."""
    devices = [device for device in read_all(folder) if device.device.get("kind") == "cuda"]
    if not devices:
        return f"Not yet measured: no GPU was at hand.\n\n{table(GOAL_HEAD, goal_rows(None))}"
    return "\n\n".join(f"{device.device['device']}:\n\n{table(GOAL_HEAD, goal_rows(device))}" for device in devices)


def sections(results: RuntimeResults, folder: Path, place: Path) -> list[str]:
    """Of one device: where from, goals and misses, and of every subject its table and plots."""
    found = [f"### {results.device['device']}", source(results)]
    if results.device.get("kind") == "cuda":
        found.append(table(GOAL_HEAD, goal_rows(results)))
    if missed := misses(results, read_remarks(folder)):
        found.append("Misses, with what bounds them:\n\n" + "\n".join(f"- {line}" for line in missed))
    for subject, (head, cells) in TABLES.items():
        if rows := [row for row in results.rows if row["subject"] == subject]:
            found.append(f"#### {subject.capitalize()}")
            found += [
                f"![{subject}]({os.path.relpath(picture, place)})"
                for picture in sorted(folder.glob(f"{results.name}-{subject}*.png"))
            ]
            body = [[case_of(row), *cells(row, results)] for row in sorted(rows, key=order)]
            found.append(f"{table(['case', *head], body)}\n\n{reasons(rows)}".strip())
            found += [kernels(row) for row in rows if "table" in row.get("kernels", {})]
    return found


def order(row: Row) -> tuple[str, int, int]:
    """How rows follow each other."""
    fields = row["fields"]
    return f"{fields['model']} {fields['weights']} {fields['layers']}", fields["batch"], fields["context"]


def case_of(row: Row) -> str:
    """As "glm-4-9b int4 ×1 context=1024"."""
    return f"{row['label']} {row['axis'][0]}={row['axis'][1]}"


def source(results: RuntimeResults) -> str:
    """Where the figures come from, run by run."""
    lines = []
    for run in results.runs:
        count = sum(row["run"] == run["id"] for row in results.rows)
        versions = ", ".join(f"{name} {number}" for name, number in run["versions"].items())
        read, multiply = run["roofs"]["read"] / 1e12, run["roofs"]["multiply"] / 1e12
        lines.append(
            f"{count} case{'s' * (count != 1)} of {run['date']}, commit {run['commit']}: R = {read:.3g} TB/s, "
            f"C = {multiply:.3g} TFLOP/s, {versions}."
        )
    return (
        "Random weights at the published shapes, integers drawn as integers; all sides on the same weights, in turn "
        "in one process, by the clock of the host; medians, ± half of the way from the tenth to the ninetieth "
        "percentile. R is the rate of a stream that only reads, C that of a bf16 matrix product, both measured in the "
        f"run. Written by `{COMMAND}`.\n\n" + "\n".join(f"- {line}" for line in lines)
    )


# ----------------------------------------------------------------------------- goals

GOAL_HEAD = ["what", "goal", "at first", "measured", "how many cases reach what"]


def goal_rows(results: RuntimeResults | None) -> list[list[str]]:
    """Every goal with its worst and best case; the columns of GOAL_HEAD."""
    rows = []
    for goal in GOALS:
        accept = "–" if goal.accept is None else f"{goal.sign} {goal.written(goal.accept)}"
        cells = [goal.name, f"{goal.sign} {goal.written(goal.goal)}", accept]
        covered = [] if results is None else [row for row in results.rows if goal in goals_of(row, results)]
        values = sorted(value for row in covered if results and (value := goal.value(row, results)) is not None)
        states = [goal.verdict(value) for value in values]
        measured = (
            " … ".join(goal.written(value) for value in dict.fromkeys((values[0], values[-1]))) if values else "not yet"
        )
        counts = [f"{states.count(state)} {word}" for state, word in STATES.items() if state in states]
        if without := len(covered) - len(values):
            counts.append(f"{without} without a figure")
        rows.append([*cells, measured, ", ".join(counts) or "–"])
    return rows


def misses(results: RuntimeResults, remarks: list[dict[str, str]]) -> list[str]:
    """A line for every case that misses what is accepted at first, or the goal where nothing less is accepted."""
    lines = []
    for row in results.rows:
        for goal in goals_of(row, results):
            value = goal.value(row, results)
            if value is None or goal.verdict(value) != "miss":
                continue
            name = f"{row['subject']} {case_of(row)}"
            known = {"subject": row["subject"], "label": row["label"], "axis": row["axis"]}
            said = [each["text"] for each in remarks if matches(each, results, known)]
            least = goal.goal if goal.accept is None else goal.accept
            what = goal.name.partition(": ")[2]
            lines.append(
                f"{name}: {goal.written(value)} {what}, {goal.sign} {goal.written(least)} wanted. "
                f"{' '.join(said) or 'Not yet explained.'}"
            )
    return lines


# ----------------------------------------------------------------------------- tables


def why(side: Mapping[str, Any]) -> str:
    """Why a side has no figure."""
    return next((f"{word}: {side[word]}" for word in ("refused", "failed", "missing") if word in side), "–")


def blank(row: Row, count: int) -> list[str] | None:
    """The cells of a row without a figure of ours: why, and nothing."""
    if "skipped" in row:
        return [f"skipped: {row['skipped']}", *["–"] * (count - 1)]
    mine = row["sides"].get(OURS, {"missing": "not measured"})
    if "refused" in mine:
        return [f"**no figure, its check failed**: {mine['refused']}", *["–"] * (count - 1)]
    return [why(mine), *["–"] * (count - 1)] if why(mine) != "–" else None


def ratios(row: Row) -> str:
    """How many times as fast as every side that has a figure, and what became of the others."""
    mine, cells = seconds(row), []
    for name, side in row["sides"].items():
        if name != OURS:
            theirs = seconds(row, name)
            word = next((word for word in ("refused", "failed", "missing") if word in side), "–")
            cells.append(f"{name} {word}" if theirs is None or mine is None else f"{theirs / mine:.2f}× {name}")
    return ", ".join(cells) or "–"


def spread(side: Mapping[str, Any]) -> str:
    """As " ± 1.2 %"."""
    return f" ± {50 * (side['high'] - side['low']) / side['seconds']:.1f} %"


def size(count: float) -> str:
    """Bytes, as "17.56 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def decode_cells(row: Row, results: RuntimeResults) -> list[str]:
    """Of HEADS["decode"]."""
    if cells := blank(row, 6):
        return cells
    mine, taken = row["sides"][OURS], seconds(row)
    part, per_token = fraction(row, results), row["bytes"] / row["tokens"]
    assert taken is not None
    assert part is not None
    against = f"{row['moved'] / row['bytes']:.3f} × {size(per_token)}" if "moved" in row else size(per_token)
    kernels = row.get("kernels", {})
    number = f"{kernels['per step']:.0f} {kernels['what']}" if "table" in kernels else f"? ({why(kernels)})"
    figures = [f"{speed(row):.1f}{spread(mine)}", f"{1e3 * taken:.2f} ms", f"{100 * part:.0f} % R"]
    return [*figures, against, number, ratios(row)]


def prefill_cells(row: Row, results: RuntimeResults) -> list[str]:
    """Of HEADS["prefill"]."""
    if cells := blank(row, 4):
        return cells
    taken, part = seconds(row), of_matmul(row, results)
    assert taken is not None
    assert part is not None
    return [
        f"{speed(row):.0f}{spread(row['sides'][OURS])}", f"{row['flops'] / taken / 1e12:.3g} TFLOP/s",
        f"{100 * part:.0f} % C", ratios(row),
    ]  # fmt: skip


def memory_cells(row: Row, results: RuntimeResults) -> list[str]:
    """Of HEADS["memory"]."""
    if cells := blank(row, 5):
        return cells
    mine = row["sides"][OURS]
    parts = [size(mine[part]) for part in ("peak", "weights", "cache", "logits")]
    return [*parts, f"{mine['over needed']:.3f}×"]


def start_cells(row: Row, results: RuntimeResults) -> list[str]:
    """Of HEADS["start"]."""
    if cells := blank(row, 7):
        return cells
    mine = row["sides"][OURS]
    cold = f"{sum(mine['cold'].values()):.2f} s" if "cold" in mine else "–"
    return [f"{mine['seconds']:.2f} s", *(f"{value:.2f}" for value in mine["parts"].values()), cold]


def serve_cells(row: Row, results: RuntimeResults) -> list[str]:
    """Of HEADS["serve"]."""
    if cells := blank(row, 4):
        return cells
    mine = row["sides"][OURS]
    first, between = (" / ".join(f"{1e3 * value:.1f} ms" for value in mine[name]) for name in ("first", "between"))
    queue = f"{mine['queue']['mean']:.1f}, at most {mine['queue']['most']}"
    return [f"{mine['tokens/s']:.0f}", first, between, queue]


Cells = Callable[[Row, RuntimeResults], list[str]]
TABLES: dict[str, tuple[Sequence[str], Cells]] = {
    "decode": (
        ("tokens/s", "a step", "of roof", "moved × floor a token", "a step in", "times as fast as"), decode_cells,
    ),
    "prefill": (("tokens/s", "rate", "of roof", "times as fast as"), prefill_cells),
    "memory": (("peak", "weights", "cache", "logits", "peak over these"), memory_cells),
    "start": (("to first token", "python", "import", "load", "compose", "first", "cold"), start_cells),
    "serve": (("tokens/s", "first token p50 / p95", "between tokens p50 / p95", "waiting"), serve_cells),
}  # fmt: skip


def kernels(row: Row) -> str:
    """Where the time of a step goes."""
    found = row["kernels"]
    rows = [
        [f"`{line['name'][:70]}`", f"{line['count']:.1f}", f"{1e6 * line['seconds']:.1f} µs", share(line, found)]
        for line in found["table"][:KERNELS]
    ]
    if rest := found["table"][KERNELS:]:
        took = sum(line["seconds"] for line in rest)
        cells = f"{sum(line['count'] for line in rest):.1f}", f"{1e6 * took:.1f} µs"
        rows.append([f"{len(rest)} others", *cells, share({"seconds": took}, found)])
    body = table([found["what"], "a step", "time", "of all"], rows)
    return f"<details><summary>{case_of(row)}: {found['what']} of a step</summary>\n\n{body}\n\n</details>"


def share(line: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Its part of all."""
    return f"{100 * line['seconds'] / found['seconds']:.0f} %"


def reasons(rows: Sequence[Row]) -> str:
    """Why sides have no figure, each reason once."""
    said: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, side in row.get("sides", {}).items():
            if (reason := why(side)) != "–":
                said[name, reason] = said.get((name, reason), 0) + 1
    lines = [f"- {name}: {reason} ({count})" for (name, reason), count in said.items()]
    return "Without a figure (in so many cases):\n\n" + "\n".join(lines) if lines else ""


def goal_lines(row: Row, results: RuntimeResults) -> list[str]:
    """The goals of one row, each with what it reaches."""
    lines = []
    for goal in goals_of(row, results):
        value = goal.value(row, results)
        state = "no figure" if value is None else f"{goal.written(value)}: {STATES[goal.verdict(value)].strip('*')}"
        lines.append(f"{goal.name} {goal.sign} {goal.written(goal.goal)}: {state}")
    return lines


__all__ = ["BLOCK", "GOALS_BLOCK", "Goal", "goal_lines", "goals_markdown", "markdown"]
