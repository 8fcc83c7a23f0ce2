"""Runs `glm.verify` in float64 over every golden in the repository and writes kernels/results/parity.json.

python docs/parity.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from glm_kernels.bench.machine import provenance, write  # noqa: E402

from glm.verify import Report, verify  # noqa: E402


def summary(report: Report) -> dict[str, object]:
    """One line of the table: the worst of each quantity."""
    greedy = [row for row in report.rows if "greedy" in row.quantity]
    return {
        "case": report.folder.name,
        "scenarios": len({row.scenario for row in report.rows}),
        "logits": max(row.relative for row in report.rows if "logits" in row.quantity),
        "hidden": max((row.absolute for row in report.rows if "hidden" in row.quantity), default=0.0),
        "greedy": f"{sum(row.ok for row in greedy)} of {len(greedy)} equal",
        "ok": report.ok,
    }


def main() -> int:
    """Verify, write, and fail if anything is over its tolerance."""
    rows = [summary(verify(folder)) for folder in sorted((ROOT / "tests" / "goldens").iterdir()) if folder.is_dir()]
    print(write("parity", provenance() | {"rows": rows}))
    return 0 if rows and all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
