"""The pictures in the repository are what would be drawn."""

import sys
from pathlib import Path

import pytest

from docs import drawing, figures


def test_no_picture_is_stale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["figures.py", "--check"])
    assert figures.main() == 0, capsys.readouterr().out


def test_a_stale_picture_is_found_and_mended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = (lambda number=number: drawing.bars(["a"], {"b": [number]}) for number in (1, 2))
    path = tmp_path / "bars.svg"
    old().save(path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {path: new})
    for arguments, status in ((["--check"], 1), ([], 0), (["--check"], 0)):
        monkeypatch.setattr(sys, "argv", ["figures.py", *arguments])
        assert figures.main() == status
    assert capsys.readouterr().out.splitlines() == ["stale: bars.svg", "drawn anew: bars.svg", "stale: nothing"]
    assert path.read_text(encoding="utf-8") == new().svg()


def test_pictures_stand_where_they_are_shown() -> None:
    shown = (figures.ROOT / "README.md").read_text(encoding="utf-8")
    for path in figures.FIGURES:
        assert f"({path.relative_to(figures.ROOT)})" in shown
