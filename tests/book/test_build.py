"""What must end a build of the book does end it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("myst_nb", reason="the book's tools are not installed: make .venv/.book")

ROOT = Path(__file__).parents[2]


def build(folder: Path, cell: str, prose: str = "") -> subprocess.CompletedProcess[str]:
    """Build a book of one chapter under the settings of ours."""
    (folder / "index.md").write_text("# Book\n\n```{toctree}\nchapters/01_one\n```\n", encoding="utf-8")
    (folder / "chapters").mkdir()
    text = f"# %% [markdown]\n# # One\n#\n# {prose}\n\n# %%\nimport glm\nfrom docs import drawing\n\n{cell}\n"
    (folder / "chapters" / "01_one.py").write_text(text, encoding="utf-8")
    (folder / "static").mkdir()
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "--show-traceback",
        "-c",
        str(ROOT / "docs"),
        str(folder),
        str(folder / "built"),
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_a_sound_chapter_is_built_with_its_picture_and_formula(tmp_path: Path) -> None:
    done = build(tmp_path, 'drawing.bars(["a"], {"b": [len(glm.releases())]})', "Let $x \\in \\mathbb{R}$.")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "built" / "chapters" / "01_one.html").read_text(encoding="utf-8")
    assert "<math" in page
    assert ".svg" in page
    assert "formula" not in done.stderr


def test_a_broken_assertion_ends_the_build(tmp_path: Path) -> None:
    done = build(tmp_path, 'assert "chatglm-7b" in glm.releases()')
    assert done.returncode != 0
    assert "AssertionError" in done.stdout + done.stderr


def test_a_formula_that_cannot_be_written_is_a_warning(tmp_path: Path) -> None:
    done = build(tmp_path, "glm", "Let $\\nosuch x$.")
    assert "Unknown LaTeX command" in done.stderr
