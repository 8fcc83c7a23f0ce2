"""No figure stands in a document that no command wrote."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_tables_are_what_the_results_say() -> None:
    run = subprocess.run([sys.executable, "docs/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_a_stale_table_is_found(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    import tables

    text = "<!-- begin releases -->\n| an old table |\n<!-- end releases -->\n"
    assert "chatglm3-6b" in tables.rewritten(text)
    assert "an old table" not in tables.rewritten(text)
