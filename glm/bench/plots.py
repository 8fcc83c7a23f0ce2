"""Pictures: decode speed against context, and the time of a layer as stacked bars against the floor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm.bench.cases import shape
from glm.bench.goals import EAGER, GPT_FAST, OURS, OVERLAP, STATIC, seconds, speed
from glm.bench.results import Row, RuntimeResults

COLOURS = {OURS: "#c1272d", GPT_FAST: "#0072b2", EAGER: "#009e73", STATIC: "#e69f00", OVERLAP: "#7b5ea7"}
PARTS = 6  # kernels that have a colour of their own
STACK = "#c1272d", "#0072b2", "#009e73", "#e69f00", "#7b5ea7", "#8c564b", "#bbbbbb", "#e8e8e8"


def draw(results: RuntimeResults, folder: Path) -> list[Path]:
    """`folder/<name>-decode-….png`, as far as there are figures.

    Raises ModuleNotFoundError where matplotlib is not installed.
    """
    rows = [row for row in results.rows if row["subject"] == "decode" and seconds(row) is not None]
    found = []
    if sweeps := sweeps_of(rows):
        found.append(contexts(sweeps, results, folder / f"{results.name}-decode-context.png"))
    if bars := [row for row in rows if "table" in row.get("kernels", {})]:
        found.append(layers(bars, results, folder / f"{results.name}-decode-layer.png"))
    return found


def sweeps_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in context only, by context, where there are several."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["fields"]["context"]):
        groups.setdefault(row["label"], []).append(row)
    return {label: group for label, group in groups.items() if len(group) > 1}


def contexts(sweeps: dict[str, list[Row]], results: RuntimeResults, path: Path) -> Path:
    """Tokens a second of every side against context; the floor is a dotted line."""
    from matplotlib.figure import Figure

    columns = min(2, len(sweeps))
    lines = -(-len(sweeps) // columns)
    figure = Figure(figsize=(5.2 * columns, 3.4 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for place, (label, rows) in zip(axes.flat, sweeps.items(), strict=False):
        for side in dict.fromkeys(name for row in rows for name in row["sides"]):
            points = [(row["fields"]["context"], value) for row in rows if (value := speed(row, side)) is not None]
            if points:
                ours = {"lw": 2, "zorder": 3} if side == OURS else {"lw": 1}
                (handles[side],) = place.plot(*zip(*points, strict=True), "o-", ms=3, color=COLOURS.get(side), **ours)
        most = [(row["fields"]["context"], roof(row, results)) for row in rows]
        (handles["all that memory allows"],) = place.plot(*zip(*most, strict=True), ":", color="black", lw=1)
        place.set_xscale("log", base=2)
        sizes = sorted({row["fields"]["context"] for row in rows})
        place.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes], fontsize=8)
        place.minorticks_off()
        place.set_ylim(bottom=0)
        place.set_title(label, fontsize=9)
        place.set_xlabel("context", fontsize=8)
        place.set_ylabel("tokens/s", fontsize=8)
        place.grid(alpha=0.25)
    for place in axes.flat[len(sweeps) :]:
        place.set_axis_off()
    figure.suptitle(f"Decoding on {results.device['device']}", fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=8)
    return written(figure, path)


def roof(row: Row, results: RuntimeResults) -> float:
    """Tokens a second if the floor's bytes came at R."""
    return float(row["tokens"] * results.run_of(row)["roofs"]["read"] / row["bytes"])


def stack(row: Row) -> list[tuple[str, float]]:
    """Seconds of a step by kernel, the longest first; then all others, and what is between kernels."""
    table = row["kernels"]["table"]
    parts = [(line["name"], float(line["seconds"])) for line in table[:PARTS]]
    parts.append(("other kernels", sum(line["seconds"] for line in table[PARTS:])))
    between = (seconds(row) or 0.0) - sum(value for _, value in parts)
    return [*parts, ("between kernels", max(0.0, between))]


def layers(rows: Sequence[Row], results: RuntimeResults, path: Path) -> Path:
    """A step divided by its layers, a bar a case, and a line where the floor's bytes at R would end."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 0.62 * len(rows) + 2.6), layout="constrained")
    place = figure.subplots()
    for y, row in enumerate(rows):
        fields, left = row["fields"], 0.0
        count = len(shape(fields["model"], fields["weights"], fields["layers"]).blocks)
        for (name, value), colour in zip(stack(row), STACK, strict=False):
            width = 1e6 * value / count
            place.barh(y, width, left=left, color=colour, edgecolor="white", height=0.6)
            if width > 0 and name not in ("other kernels", "between kernels"):
                place.annotate(name[:20], (left + width / 2, y - 0.34), fontsize=5, ha="center", va="bottom")
            left += width
        floor = 1e6 * row["bytes"] / results.run_of(row)["roofs"]["read"] / count
        place.plot([floor, floor], [y - 0.4, y + 0.4], color="black", lw=2)
    place.set_yticks(range(len(rows)), [f"{row['label']} S={row['fields']['context']}" for row in rows], fontsize=7)
    place.invert_yaxis()
    place.set_xlabel("µs a layer, head included; black: the floor at R; grey: other kernels; pale: between kernels")
    place.xaxis.label.set_fontsize(8)
    place.set_title(f"Where a step goes on {results.device['device']}", fontsize=10)
    return written(figure, path)


def written(figure: Any, path: Path) -> Path:
    """A picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    return path
