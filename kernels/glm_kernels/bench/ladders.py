"""The steps of the ladders in kernels/ladders/, each on the same case, which is one of the subject they lead up to.

A ladder is measured from a checkout only; an installed package does not bring it along.
"""

import importlib.util
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from glm_kernels.bench import attention, decode, int4
from glm_kernels.bench import cases as published
from glm_kernels.bench.machine import ROOT
from glm_kernels.bench.peers import OURS
from glm_kernels.bench.report import roof, time
from glm_kernels.bench.results import Results
from glm_kernels.bench.subject import Call, Case, Inputs, Side, Subject

FOLDER = ROOT / "kernels" / "ladders"
CASES: dict[str, tuple[Subject[Any], Case]] = {
    "attention": (attention.SUBJECT, attention.case(published.GLM_4_9B, "causal", 1, 8192, 1)),
    "decode": (decode.SUBJECT, decode.case(published.GLM_4_9B, 8, 32768, 1)),
    "int4": (int4.SUBJECT, int4.LADDER),
}


@dataclass(frozen=True, kw_only=True)
class LadderCase(Case):
    """All steps of one ladder."""

    ladder: str

    @property
    def of(self) -> tuple[Subject[Any], Any]:
        """The subject and the case that the steps compute."""
        return CASES[self.ladder]


@cache
def loaded() -> Any:
    """kernels/ladders/ladder.py, or None where it is not."""
    path = FOLDER / "ladder.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("ladder", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its classes look themselves up there
    spec.loader.exec_module(module)
    return module


def all_cases() -> list[LadderCase]:
    """One a ladder that is there."""
    names = loaded().ladders() if loaded() else []
    return [
        LadderCase(model=CASES[name][1].model, dtype=CASES[name][1].dtype, ladder=name)
        for name in names
        if name in CASES
    ]


def step(function: Any, inputs: Inputs) -> Call:
    """A step takes of the inputs what it names."""
    return partial(
        function, **{name: inputs[name] for name in inspect.signature(function).parameters if name in inputs}
    )


def sides(case: LadderCase) -> list[Side]:
    """Ours, and every step."""
    subject, inner = case.of
    steps = [Side(each.name, partial(step, each.call)) for each in loaded().steps(case.ladder)]
    return [side for side in subject.sides(inner) if side.name == OURS] + steps


def figures(devices: Sequence[Results]) -> dict[str, dict[str, str]]:
    """What is measured of every step, on every device, as it stands in the table of its ladder."""
    found: dict[str, dict[str, str]] = {}
    for results in devices:
        for row in results.rows:
            if row["subject"] != SUBJECT.name:
                continue
            for name, side in row.get("sides", {}).items():
                reached = roof(row, results, name)
                if name == OURS or reached is None:  # ours is no step
                    continue
                part, bound = reached
                text = f"{time(side['seconds'])}, {100 * part:.0f} % {bound} ({results.device['device']})"
                steps = found.setdefault(row["fields"]["ladder"], {})
                steps[name] = f"{steps[name]}; {text}" if name in steps else text
    return found


def write(devices: Sequence[Results]) -> bool:
    """Write the figures into the ladders' own README.md, if there are any."""
    found: Mapping[str, Mapping[str, str]] = figures(devices)
    if not found or not loaded():
        return False
    loaded().write(found)
    return True


def label(case: LadderCase) -> str:
    """As "ladder to decode, GLM-4-9B ×8"."""
    subject, inner = case.of
    return f"ladder to {case.ladder}, {subject.label(inner)}"


SUBJECT = Subject(
    "ladders", "Ladders", all_cases, lambda case, device, seed: case.of[0].inputs(case.of[1], device, seed),
    lambda case: case.of[0].outputs(case.of[1]), lambda case: case.of[0].work(case.of[1]), sides,
    lambda case, inputs: case.of[0].expected(case.of[1], inputs), label, lambda case: case.of[0].axis(case.of[1]),
)  # fmt: skip
