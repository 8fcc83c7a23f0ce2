"""The guides: a change of the model is as short as its page says. What it does, the page asserts itself."""

import ast
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "change_the_model.py"
CELLS = re.split(r"^# %%", PAGE.read_text(encoding="utf-8"), flags=re.M)
CHANGES = [cell.partition("\n")[2].strip() for cell in CELLS if cell.startswith(' tags=["change"]')]
MOST = 20


def lines(code: str) -> int:
    """Lines of code and docstrings."""
    return sum(bool(line.strip()) for line in code.splitlines())


def test_there_is_a_change_of_each_kind() -> None:
    bases = {
        base.id
        for change in CHANGES
        for node in ast.walk(ast.parse(change))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    assert {"Rotary", "Attention", "AttentionModule", "Causal"} <= bases  # positions, mixer, mask
    assert len(CHANGES) == 5
    assert "five changes" in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.split("\n")[-1][:30])
def test_a_change_is_short(change: str) -> None:
    assert 1 <= lines(change) <= MOST
    assert max(map(len, change.splitlines())) <= 120


def test_lines_are_counted() -> None:
    assert lines("a\n\n  b\n") == 2
