"""A ladder: the road from a naive kernel to the one in glm_kernels, one numbered file a step.

A step `<ladder>/NN_name.py` has at most 80 lines. Its docstring is one sentence, what this step adds to the one before.
It defines a function with the ladder's name, as `decode(q, k, v, length)`, and every step of a ladder is called alike
and computes the same. The figures are written by the benchmark, `write({ladder: {step: figure}})`, never by hand.
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
UNMEASURED = "not yet measured"

if str(FOLDER.parent) not in sys.path:  # the steps import glm_kernels
    sys.path.insert(0, str(FOLDER.parent))


class Step(NamedTuple):
    """One file: its name without .py, its sentence, and the function it defines."""

    name: str
    idea: str
    call: Callable[..., Tensor]


def ladders() -> list[str]:
    """The names of the ladders, which are those of the folders with numbered files."""
    return sorted({path.parent.name for path in FOLDER.glob("*/[0-9][0-9]_*.py")})


def files(ladder: str) -> list[Path]:
    """The numbered files, lowest step first."""
    return sorted((FOLDER / ladder).glob("[0-9][0-9]_*.py"))


def steps(ladder: str) -> list[Step]:
    """Every step of a ladder, loaded."""
    return [load(path) for path in files(ladder)]


def load(path: Path) -> Step:
    """The step in one file."""
    name = f"ladders.{path.parent.name}.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return Step(path.stem, " ".join((module.__doc__ or "").split()), getattr(module, path.parent.name))


def table(ladder: str, figures: Mapping[str, str]) -> str:
    """The steps with their sentences and figures, in Markdown."""
    rows = [
        f"| [`{step.name}`]({ladder}/{step.name}.py) | {step.idea} | {figures.get(step.name, UNMEASURED)} |"
        for step in steps(ladder)
    ]
    return "\n".join(["| step | idea | measured |", "| --- | --- | --- |", *rows])


def rewritten(text: str, figures: Mapping[str, Mapping[str, str]]) -> str:
    """`text` with the table of every ladder between its markers, <!-- begin decode --> and <!-- end decode -->."""
    for ladder in ladders():
        pattern = rf"(<!-- begin {ladder} -->\n).*?(<!-- end {ladder} -->)"
        body = table(ladder, figures.get(ladder, {}))
        text, found = re.subn(pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.S)  # type: ignore[misc]
        assert found == 1, f"{README} has {found} places for the ladder {ladder}"
    return text


def write(figures: Mapping[str, Mapping[str, str]]) -> None:
    """Write README.md anew; a step without a figure says that it is not yet measured."""
    README.write_text(rewritten(README.read_text(encoding="utf-8"), figures), encoding="utf-8")


if __name__ == "__main__":
    write({})
