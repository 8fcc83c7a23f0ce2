"""Every formula of the book can be written as MathML."""

import re
from pathlib import Path

import pytest

pytest.importorskip("docutils.utils.math.latex2mathml")
from docutils.utils.math import MathError

from docs.formulas import mathml

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [path for folder in ("chapters", "load", "pages", ".") for path in sorted((DOCS / folder).glob("*.*"))]


def formulas(path: Path) -> list[tuple[str, bool]]:
    """Every formula of a page, and whether it stands by itself."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        prose = (line for line in text.splitlines() if line.startswith("#"))
        text = "\n".join(line.removeprefix("#").strip() for line in prose)
    text = re.sub(r"^ *```.*?^ *```|`[^`\n]+`", "", text, flags=re.S | re.M)
    return [(m[1] or m[2], m[1] is not None) for m in re.finditer(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, re.S)]


@pytest.mark.parametrize("path", [path for path in PAGES if path.suffix in (".py", ".md")], ids=lambda path: path.name)
def test_every_formula_can_be_written(path: Path) -> None:
    for tex, block in formulas(path) if path.parent != DOCS or path.suffix == ".md" else []:
        assert mathml(tex, block).strip().startswith("<math")


def test_commands_that_docutils_does_not_know() -> None:
    assert mathml(r"x_1 \dots x_n") == mathml(r"x_1 \ldots x_n")
    assert mathml(r"\big( x \big)") == mathml(r"( x )")
    with pytest.raises(MathError, match="nosuch"):
        mathml(r"\nosuch x")


def test_formulas_are_found() -> None:
    assert any(formulas(path) for path in PAGES if path.name == "00_family.py")
