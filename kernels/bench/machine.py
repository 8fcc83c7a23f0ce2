"""What every result file says of where it came from: device, versions, commit, date."""

import json
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "kernels" / "results"


def processor() -> str:
    """The model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit checked out, with a mark when tracked files differ from it."""
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() + (" with changes" if dirty.stdout.strip() else "")


def provenance(*packages: str) -> dict[str, Any]:
    """Device, threads, versions of torch and `packages`, commit and date."""
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", *packages)} | {"python": platform.python_version()},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `results/<name>.json` whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    one_line = re.compile(r"\[\s+([^][{}]+?)\s+\]")  # lists of numbers
    text = one_line.sub(lambda row: f"[{' '.join(row[1].split())}]", json.dumps(result, indent=1))
    temporary.write_text(text + "\n")
    os.replace(temporary, path)
    return path
