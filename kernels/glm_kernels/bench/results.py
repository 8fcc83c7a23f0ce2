"""The file of one device: rows, each of one case, and the runs they come from.

    {"format": …, "device": {"device": name, …},
     "runs": [{"id", "date", "commit", "versions", "driver", "roofs", "clocks", …}],
     "rows": [{"run", "subject", "fields", "label", "axis", "bytes", "flops", "sides" or "skipped"}]}

A new row takes the place of the old one of the same case, and rows that a run did not reach stay as they are, with
the run they come from: so a device that is rented by the minute can be measured in several sittings. What is compared
within a row was measured in the same run, and a row is graded by the roofs of its run.
"""

import json
import re
from pathlib import Path
from typing import Any

from glm_kernels.bench.machine import save
from glm_kernels.bench.subject import Case

FORMAT = "glm_kernels.bench 1"
Row = dict[str, Any]


class Results:
    """What is known of one device."""

    def __init__(self, device: dict[str, Any], runs: list[dict[str, Any]], rows: list[Row]) -> None:
        self.device, self.runs, self.rows = device, runs, rows

    @property
    def name(self) -> str:
        """Of the file, without its ending."""
        return slug(self.device["device"])

    def begin(self, facts: dict[str, Any]) -> dict[str, Any]:
        """A new run."""
        run = {"id": 1 + max((run["id"] for run in self.runs), default=0), **facts}
        self.runs.append(run)
        return run

    def put(self, row: Row) -> None:
        """Add a row in place of an older one of the same case, and forget runs that no row comes from."""
        kept = [old for old in self.rows if key(old) != key(row)]
        self.rows = [*kept, row]
        used = {row["run"] for row in self.rows}
        self.runs = [run for run in self.runs if run["id"] in used]

    def run_of(self, row: Row) -> dict[str, Any]:
        """Where a row comes from."""
        return next(run for run in self.runs if run["id"] == row["run"])

    def has(self, subject: str, case: Case, commit: str) -> bool:
        """Whether a case was measured at this commit."""
        wanted = key({"subject": subject, "fields": case.fields})
        return any(key(row) == wanted and self.run_of(row)["commit"] == commit for row in self.rows)

    def save(self, folder: Path) -> Path:
        """Write `folder/<device>.json` whole or not at all."""
        everything = {"format": FORMAT, "device": self.device, "runs": self.runs, "rows": self.rows}
        return save(folder / f"{self.name}.json", everything)


def key(row: Row) -> str:
    """What two rows of one case have in common."""
    return json.dumps([row["subject"], row["fields"]], sort_keys=True)


def slug(name: str) -> str:
    """A device's name as a file's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "device"


def read(path: Path) -> Results | None:
    """A file of results, or None where `path` holds something else.

    Raises:
        ValueError: A file of another version of this format.
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    known = str(found.get("format", "")) if isinstance(found, dict) else ""
    if not known.startswith(FORMAT.split()[0]):
        return None
    if known != FORMAT:
        raise ValueError(f"{path} is of format {known!r}, and this is {FORMAT!r}: move it away and measure again")
    return Results(found["device"], found["runs"], found["rows"])


def read_all(folder: Path) -> list[Results]:
    """Every device in a folder."""
    return [found for path in sorted(folder.glob("*.json")) if (found := read(path)) is not None]


def of_device(folder: Path, device: dict[str, Any]) -> Results:
    """What is known of this device already, or a fresh start."""
    path = folder / f"{slug(device['device'])}.json"
    found = read(path) if path.exists() else None
    return Results(device, found.runs if found else [], found.rows if found else [])
