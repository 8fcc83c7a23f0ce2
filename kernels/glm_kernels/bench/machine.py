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

import torch

ROOT = Path(__file__).resolve().parents[3]  # of a checkout
RESULTS = ROOT / "kernels" / "results"


def processor() -> str:
    """The model name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit checked out, with a mark when tracked files differ from it; "unknown" outside of a checkout."""
    if not RESULTS.is_dir():
        return "unknown"
    try:
        run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return (run.stdout.strip() or "unknown") + (" with changes" if dirty.stdout.strip() else "")


def today() -> str:
    """The date, as 2026-01-31."""
    return datetime.now(UTC).date().isoformat()


def provenance(*packages: str) -> dict[str, Any]:
    """Device, threads, versions of torch and `packages`, commit and date."""
    return {
        "device": processor(),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", *packages)} | {"python": platform.python_version()},
        "commit": commit(),
        "date": today(),
    }


def gpu(device: torch.device) -> dict[str, Any]:
    """Name, driver, and what a benchmark must know of a GPU: bytes of memory and of its last cache."""
    facts = torch.cuda.get_device_properties(device)
    return {
        "device": facts.name,
        "driver": query(device, "driver_version").get("driver_version", "unknown"),
        "cuda": torch.version.cuda or torch.version.hip,
        "capability": f"{facts.major}.{facts.minor}",
        "processors": facts.multi_processor_count,
        "memory": facts.total_memory,
        "l2": facts.L2_cache_size,
    }


CLOCKS = "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu"  # MHz, MHz, W, °C


def clocks(device: torch.device) -> dict[str, float]:
    """Clocks, power and temperature at this moment, as far as `nvidia-smi` tells."""
    found = {}
    for name, value in query(device, *CLOCKS).items():
        try:
            found[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return found


def query(device: torch.device, *names: str) -> dict[str, str]:
    """What `nvidia-smi` says of a GPU, or nothing."""
    try:
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, AttributeError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in run.stdout.strip().split(",")]
    return dict(zip(names, values, strict=True)) if run.returncode == 0 and len(values) == len(names) else {}


def save(path: Path, result: dict[str, Any]) -> Path:
    """Write a result file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    one_line = re.compile(r"\[\s+([^][{}]+?)\s+\]")  # lists of numbers
    text = one_line.sub(lambda row: f"[{' '.join(row[1].split())}]", json.dumps(result, indent=1, ensure_ascii=False))
    return save_text(path, text + "\n")


def save_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def write(name: str, result: dict[str, Any]) -> Path:
    """Write `kernels/results/<name>.json` of the checkout."""
    return save(RESULTS / f"{name}.json", result)
