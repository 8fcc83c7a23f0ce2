"""The file of one device, `runtime_<device>.json`, in the form of the kernels' own: see `glm_kernels.bench.results`.

A row is one case. Beside "subject", "label", "axis" and "fields" it has "sides", each with its figures or why it has
none, and whatever `measure` of its subject counted; or it has "skipped", with the reason.
"""

import json
from pathlib import Path
from typing import Any

from glm_kernels.bench.machine import save
from glm_kernels.bench.results import Results, Row, slug

__all__ = ["FORMAT", "Row", "RuntimeResults", "of_device", "read", "read_all"]

FORMAT = "glm.bench 1"


class RuntimeResults(Results):
    """What is known of the engine on one device."""

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return name_of(self.device)

    def save(self, folder: Path) -> Path:
        """Write `folder/runtime_<device>.json` whole or not at all."""
        everything = {"format": FORMAT, "device": self.device, "runs": self.runs, "rows": self.rows}
        return save(folder / f"{self.name}.json", everything)


def name_of(device: dict[str, Any]) -> str:
    """Of a device's file, without its ending."""
    return f"runtime_{slug(device['device'])}"


def read(path: Path) -> RuntimeResults:
    """A file of results. Raises ValueError for another format."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not of the format {FORMAT!r}: move it away and measure again")
    return RuntimeResults(found["device"], found["runs"], found["rows"])


def read_all(folder: Path) -> list[RuntimeResults]:
    """Every device in a folder."""
    return [read(path) for path in sorted(folder.glob("runtime_*.json"))]


def of_device(folder: Path, device: dict[str, Any]) -> RuntimeResults:
    """What is known of this device already, or a fresh start."""
    path = folder / f"{name_of(device)}.json"
    found = read(path) if path.exists() else None
    return RuntimeResults(device, found.runs if found else [], found.rows if found else [])
