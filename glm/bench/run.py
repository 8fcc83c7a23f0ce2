"""Runs cases in the order of their importance, within a budget of minutes, and loses nothing when cut short."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from glm_kernels.bench import machine, roofs
from glm_kernels.bench.peers import one_line, versions
from glm_kernels.bench.run import Budget, DeviceLostError, Ending
from glm_kernels.bench.timing import GraphTimer, WallClock

from glm.bench import decode, memory, prefill, serve, start
from glm.bench.cases import RuntimeCase
from glm.bench.results import Row, RuntimeResults
from glm.bench.turns import Place

Measure = Callable[[RuntimeCase, Place], dict[str, Any]]
MEASURES: dict[str, Measure] = {
    "decode": decode.measure, "prefill": prefill.measure, "memory": memory.measure, "start": start.measure,
    "serve": serve.measure,
}  # fmt: skip
CPU_BYTES, CPU_SIDE = 2**28, 512  # read, and side of matrices, where only the pipeline is tried


def facts(device: torch.device) -> dict[str, Any]:
    """What a file says of its device."""
    if device.type == "cuda":
        return machine.gpu(device) | {"kind": "cuda"}
    return {"device": machine.processor(), "kind": device.type, "threads": torch.get_num_threads()}


def begin(results: RuntimeResults, place: Place, commit: str) -> dict[str, Any]:
    """A new run, with the roofs of this device."""
    measured = roofs.measure(GraphTimer(), place.device) if place.device.type == "cuda" else cpu_roofs(place.device)
    place.bench.tidy()
    known = {"date": machine.today(), "commit": commit, "versions": versions() | transformers()}
    return results.begin(known | {"roofs": asdict(measured)})


def cpu_roofs(device: torch.device) -> roofs.Roofs:
    """Of a plain sum over more than caches hold, and of a small matrix product."""
    timer, x = WallClock(), torch.ones(CPU_BYTES // 4, device=device)
    taken = timer({"sum": [x.sum]})["sum"].seconds
    multiply, details = roofs.multiply_roof(timer, device, CPU_SIDE)
    return roofs.Roofs(x.nbytes / taken, multiply, {"read": {"bytes": x.nbytes}, "multiply": details})


def transformers() -> dict[str, str]:
    """Its version, if it is installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return {"transformers": version("transformers")}
    except PackageNotFoundError:
        return {}


def measured(case: RuntimeCase, place: Place, measure: Measure | None = None) -> Row:
    """The row of a case; of one that cannot be measured why. Raises DeviceLostError."""
    row: Row = {
        "subject": case.what, "label": case.label, "axis": ["context", case.context], "fields": case.fields
    }  # fmt: skip
    try:
        row |= (measure or MEASURES[case.what])(case, place)
    except DeviceLostError:
        raise
    except Exception as error:  # want of memory mostly: it ought not to cost the other cases
        row |= {"skipped": place.survived(error)}
    gc.collect()
    if place.device.type == "cuda":
        torch._dynamo.reset()  # what was compiled for one case holds memory that the next one needs
    place.bench.tidy()
    return row


def run(
    cases: Sequence[RuntimeCase],
    place: Place,
    results: RuntimeResults,
    folder: Path | None,
    *,
    commit: str,
    budget: Budget | None = None,
    say: Callable[[Row | None, int], None] = lambda row, done: None,
) -> Ending:
    """Measure the roofs and then the cases; the file in `folder` is written after each.

    `say` is told of every row and how many are done; first of None, when the roofs are known.
    """
    budget = budget or Budget(None)
    current = begin(results, place, commit)
    say(None, 0)
    done = 0
    try:
        for case in cases:
            if not budget.allows_another():
                return Ending(done, len(cases) - done, "the minutes are spent")
            began = budget.now()
            row = measured(case, place) | {"run": current["id"]}
            results.put(row)
            if folder is not None:
                results.save(folder)
            done += 1
            budget.taken.append(budget.now() - began)
            say(row, done)
    except KeyboardInterrupt:
        return Ending(done, len(cases) - done, "interrupted")
    except DeviceLostError as error:
        return Ending(done, len(cases) - done, f"the device was lost: {one_line(error)}", failed=True)
    return Ending(done, 0)
