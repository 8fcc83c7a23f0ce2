"""What the pictures of the book have in common: one palette, one style, and the few kinds of pictures drawn often.

    drawing.mask(layout, labels)          # who sees whom, and both positions of everybody
    drawing.bars(names, {"KiB": values})  # lengths side by side, with their numbers
    drawing.heat(matrix)                  # a matrix
    picture, axes = drawing.figure(5, 3)  # anything else

All return a `Picture`, a figure that shows itself as SVG where it is the last value of a cell; a picture made in the
same way has the same bytes. Widths are in inches; at 5 or less the letters can be read on a screen 400 pixels wide.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from glm.layout import Layout

# Colours that stay apart for the colour blind and in grey print (Okabe and Ito 2008), in the order to be used.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW = (
    "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW)
INK, PALE = "#222222", "#eeeeee"
SHADES = "cividis"  # of a matrix; rises evenly in lightness

STYLE: dict[str, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=PALETTE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.facecolor": "white",
    "font.size": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "white",
    "svg.hashsalt": "glm",  # ids of an SVG are drawn from it, and else at random
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
for name, value in STYLE.items():
    mpl.rcParams[name] = value  # type: ignore[index]


class Picture(Figure):
    """A figure that knows nothing of pyplot; made in the same way it is the same SVG."""

    def __init__(self, width: float, height: float) -> None:
        super().__init__(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(self)

    def svg(self) -> str:
        """The whole picture, in which letters are outlines: no font is needed to see it."""
        file = io.StringIO()
        with mpl.rc_context({"svg.hashsalt": STYLE["svg.hashsalt"], "svg.fonttype": "path"}):
            self.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
        return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

    def _repr_svg_(self) -> str:
        return self.svg()

    def save(self, path: Path) -> None:
        """Write it as SVG."""
        path.write_text(self.svg(), encoding="utf-8")


def figure(width: float = 5.0, height: float = 3.0) -> tuple[Picture, Axes]:
    """An empty picture, and its one pair of axes."""
    picture = Picture(width, height)
    return picture, picture.add_subplot()


def mask(layout: Layout, labels: Sequence[str], row: int = 0, title: str = "", cell: float = 0.25) -> Picture:
    """Who sees whom in one row of a layout: a line a query, a column a key, and every query's positions at the right.

    `labels` name the S keys; the T queries are the last of them. `cell` is the width of a key, in inches.
    """
    queries, keys = layout.positions.shape[1], layout.keys
    longest = max(map(len, labels), default=1)
    axes_of_positions = layout.positions.shape[2]
    width = keys * cell + 0.07 * longest + 0.45 * axes_of_positions + 0.4
    picture, axes = figure(max(width, 3.2), queries * cell + 0.07 * longest + 0.7)
    draw_mask(axes, layout, labels, row)
    if title:
        axes.set_title(title)
    return picture


def draw_mask(axes: Axes, layout: Layout, labels: Sequence[str], row: int = 0, legend: bool = True) -> None:
    """`mask`, on axes that exist already. Raises ValueError unless every key has a label."""
    visible = layout.visible[row].cpu()
    queries, keys = visible.shape
    if len(labels) != keys:
        raise ValueError(f"{keys} keys want as many labels, not {len(labels)}")
    ahead = visible.triu(keys - queries + 1)  # keys that come after the query
    kinds = visible.int() + ahead.int()
    colours = ListedColormap([PALE, BLUE, ORANGE])
    norm = BoundaryNorm([-0.5, 0.5, 1.5, 2.5], 3)
    axes.pcolormesh(kinds.numpy(), cmap=colours, norm=norm, edgecolors="white", linewidth=1.0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    axes.xaxis.tick_top()
    axes.set_xticks([j + 0.5 for j in range(keys)], labels, rotation=90)
    axes.set_yticks([i + 0.5 for i in range(queries)], labels[keys - queries :])
    axes.tick_params(length=0)
    for side in ("left", "top", "bottom"):
        axes.spines[side].set_visible(False)
    positions = layout.positions[row].cpu().tolist()
    heads = ("position",) if len(positions[0]) == 1 else ("place", "inside")
    for axis, head in enumerate(heads):
        x = keys + 1.2 + 1.8 * axis
        axes.text(x, -0.35, head, ha="center", va="bottom", rotation=90 if len(heads) > 1 else 0, clip_on=False)
        for i, position in enumerate(positions):
            axes.text(x, i + 0.5, str(position[axis]), ha="center", va="center", clip_on=False)
    if legend:
        names = {"sees": BLUE, "sees ahead": ORANGE, "does not see": PALE}
        shown = [
            name for kind, name in ((1, "sees"), (2, "sees ahead"), (0, "does not see")) if bool((kinds == kind).any())
        ]
        axes.legend(
            handles=[Patch(color=names[name], label=name) for name in shown],
            loc="upper left", bbox_to_anchor=(-0.02, -0.01), ncols=3, handlelength=1, columnspacing=1.2, borderpad=0.2,
        )  # fmt: skip


def bars(
    names: Sequence[str],
    series: Mapping[str, Sequence[float]],
    log: bool = False,
    number: str = "{:.3g}",
    width: float = 5.0,
) -> Picture:
    """Lengths side by side, first on top, each with its number behind it; a colour a series, named by its unit.

    Raises ValueError unless every series has a number for every name.
    """
    if any(len(values) != len(names) for values in series.values()):
        raise ValueError(f"every series wants {len(names)} numbers, one a name")
    thick = 0.8 / len(series)
    picture, axes = figure(width, 0.26 * len(names) * max(1, 0.75 * len(series)) + 0.75)
    for k, (what, values) in enumerate(series.items()):
        places = [i + (k - (len(series) - 1) / 2) * thick for i in range(len(names))]
        drawn = axes.barh(places, values, height=thick * 0.92, label=what, log=log)
        axes.bar_label(drawn, [number.format(value) for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.margins(x=0.14)
    if len(series) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.12), ncols=3)
    else:
        axes.set_xlabel(next(iter(series)))
    return picture


def heat(
    matrix: Tensor,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    title: str = "",
    label: str = "",
    width: float = 5.0,
) -> Picture:
    """A matrix [rows, columns] in shades, dark is little; with names of rows and columns where they are given.

    Raises ValueError for anything but a matrix, or names that are not as many.
    """
    if matrix.dim() != 2 or any(
        len(names) not in (0, n) for names, n in zip((rows, columns), matrix.shape, strict=False)
    ):
        raise ValueError(f"a matrix with a name for every row and column is wanted, not {list(matrix.shape)}")
    n, m = matrix.shape
    high = 0.07 * max(map(len, columns), default=0) + 0.5
    picture, axes = figure(width, min(max(n / m * (width - 1.5), 1.2), 1.6 * width) + high)
    mesh = axes.pcolormesh(matrix.detach().double().cpu().numpy(), cmap=SHADES)
    axes.invert_yaxis()
    if rows:
        axes.set_yticks([i + 0.5 for i in range(n)], rows)
    if columns:
        axes.xaxis.tick_top()
        axes.set_xticks([j + 0.5 for j in range(m)], columns, rotation=90 if max(map(len, columns)) > 2 else 0)
    axes.tick_params(length=0)
    if title:
        axes.set_title(title)
    picture.colorbar(mesh, ax=axes, label=label, fraction=0.05, pad=0.02)
    return picture
