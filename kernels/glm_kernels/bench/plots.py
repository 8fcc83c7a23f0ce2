"""Pictures of what was measured: percent of the roof against size, printed at the points, with the goals as lines."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glm_kernels.bench.goals import GOALS, Goal, goals_of
from glm_kernels.bench.peers import OURS
from glm_kernels.bench.report import roof
from glm_kernels.bench.results import Results, Row
from glm_kernels.bench.subject import Work

COLUMNS, MOST = 3, 18  # panels in a row, and in a picture
COLOURS = {
    OURS: "#c1272d", "SDPA cuDNN": "#0072b2", "SDPA flash": "#56b4e9", "SDPA efficient": "#999999",
    "flex_attention": "#009e73", "flashinfer": "#e69f00", "torch": "#999999", "torch.compile": "#0072b2",
    "liger": "#009e73", "reference": "#cccccc",
}  # fmt: skip
LINES = ":", "--", "-.", (0, (1, 4))  # of goals
OTHERS = "#7b5ea7", "#8c564b", "#17becf", "#bcbd22"


def draw(results: Results, folder: Path) -> list[Path]:
    """`folder/<device>-<subject>.png` for every subject with figures.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    found = []
    for subject in dict.fromkeys(row["subject"] for row in results.rows):
        panels = panels_of([row for row in results.rows if row["subject"] == subject], results)
        if panels:
            found.append(picture(subject, panels, results, folder / f"{results.name}-{subject}.png"))
    return found


def panels_of(rows: Sequence[Row], results: Results) -> dict[str, list[Row]]:
    """Cases that differ in size only, by size; those with the most sizes where there are too many."""
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["axis"][1]):
        if any(roof(row, results, side) for side in row.get("sides", {})):
            groups.setdefault(row["label"], []).append(row)
    return {label: groups[label] for label in sorted(groups, key=lambda label: (-len(groups[label]), label))[:MOST]}


def picture(subject: str, panels: dict[str, list[Row]], results: Results, path: Path) -> Path:
    """One picture, written whole or not at all."""
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.2 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False)
    handles: dict[str, Any] = {}
    for place, (label, rows) in zip(axes.flat, panels.items(), strict=False):
        handles |= panel(place, label, rows, results)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(f"{subject}: percent of the roof on {results.device['device']}", fontsize=12)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 5), fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=110)
    os.replace(temporary, path)
    return path


def panel(place: Any, label: str, rows: Sequence[Row], results: Results) -> dict[str, Any]:
    """One group of cases: a line a side, a dotted line a goal; the handles for the legend."""
    handles: dict[str, Any] = {}
    sides = list(dict.fromkeys(name for row in rows for name in row["sides"]))
    bounds = {found[1] for row in rows for side in sides if (found := roof(row, results, side))}
    others = [side for side in sides if side not in COLOURS]
    for side in sorted(sides, key=lambda name: name == OURS):  # ours is drawn last, above the others
        points = [(row["axis"][1], 100 * found[0]) for row in rows if (found := roof(row, results, side))]
        if not points:
            continue
        colour = COLOURS.get(side) or OTHERS[others.index(side) % len(OTHERS)]
        ours = side == OURS
        (handles[side],) = place.plot(
            *zip(*points, strict=True), "o-", color=colour, lw=2 if ours else 1, ms=4 if ours else 3
        )
        for x, y in points:
            place.annotate(
                f"{y:.0f}", (x, y), xytext=(0, 5 if ours else -9), textcoords="offset points", ha="center",
                color=colour, fontsize=8 if ours else 6, fontweight="bold" if ours else None,
            )  # fmt: skip
    for goal, points in goal_lines(rows, results).items():
        style = LINES[GOALS.index(goal) % len(LINES)]
        (handles[line_name(goal)],) = place.plot(*zip(*points, strict=True), ls=style, marker="_", color="black", lw=1)
    place.set_xscale("log", base=2)
    sizes = sorted({row["axis"][1] for row in rows})
    place.set_xticks(sizes, [f"{size // 1024}k" if size >= 1024 else str(size) for size in sizes], fontsize=7)
    place.minorticks_off()
    place.set_ylim(0, max(105.0, 1.1 * place.get_ylim()[1]))
    place.set_title(label, fontsize=9)
    place.set_xlabel(rows[0]["axis"][0], fontsize=8)
    place.set_ylabel(f"% of {' or '.join(sorted(bounds))}", fontsize=8)
    place.tick_params(axis="y", labelsize=7)
    place.grid(alpha=0.25)
    return handles


def line_name(goal: Goal) -> str:
    """As "goal: ≥ 1.00× SDPA cuDNN"."""
    return f"goal: {goal.sign} {goal.written(goal.goal)} {goal.against if len(goal.against) > 1 else ''}".strip()


def goal_lines(rows: Sequence[Row], results: Results) -> dict[Goal, list[tuple[int, float]]]:
    """Percent of the roof at which each goal would be reached."""
    found: dict[Goal, list[tuple[int, float]]] = {}
    for row in rows:
        roofs = results.run_of(row)["roofs"]
        floor, _ = Work(row["bytes"], row["flops"]).floor(roofs["read"], roofs["multiply"])
        for goal in goals_of(row):
            needed = goal.needs(row, results, goal.goal)
            if needed is not None:
                found.setdefault(goal, []).append((row["axis"][1], 100 * floor / needed))
    return found
