"""Runs cases in the order of their importance, within a budget of minutes, and loses nothing when cut short."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from glm_kernels.bench import machine, roofs
from glm_kernels.bench.peers import one_line, versions
from glm_kernels.bench.results import Results, Row
from glm_kernels.bench.subject import Call, Case, Expected, MissingError, Side, Subject, nbytes
from glm_kernels.bench.timing import Timer, copies

SHARE = 0.55  # of the memory that all copies of inputs and outputs may take; the rest is for peers and checks


class DeviceLostError(RuntimeError):
    """The device does not answer any more; nothing can be measured in this process."""


@dataclass
class Bench:
    """Where it is measured: a device of so much memory and last cache, and a timer."""

    device: torch.device
    timer: Timer
    memory: float
    l2: float

    def alive(self) -> None:
        """Raises DeviceLostError after a fault from which this process cannot recover."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                raise DeviceLostError(one_line(error)) from None

    def tidy(self) -> None:
        """Give memory back."""
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


# ----------------------------------------------------------------------------- one case


def measure(subject: Subject[Any], case: Case, bench: Bench) -> Row:
    """One row: of every side its seconds, or why it has none.

    Only a side whose check passed is timed, and what it gives after all the rounds is checked again: a kernel that
    leaves a counter behind is right once only.
    """
    work = subject.work(case)
    row: Row = {
        "subject": subject.name,
        "label": subject.label(case),
        "axis": list(subject.axis(case)),
        "fields": case.fields,
        "bytes": work.bytes,
        "flops": work.flops,
    }
    one = nbytes(subject.inputs(case, torch.device("meta"), 0)) + subject.outputs(case)
    if one > SHARE * bench.memory:
        need, have = one / 1e9, bench.memory / 1e9
        return row | {"skipped": f"inputs and outputs take {need:.0f} GB, the device has {have:.0f} GB"}
    inputs = subject.inputs(case, bench.device, 0)
    expected = subject.expected(case, inputs)
    sides = {side.name: side for side in subject.sides(case)}

    def wanted(side: Side) -> Sequence[Expected]:
        return expected if side.expected is None else side.expected(inputs)

    found: dict[str, dict[str, Any]] = {name: checked(side, inputs, wanted, bench) for name, side in sides.items()}
    count = copies(one, bench.l2, SHARE * bench.memory)
    batch = [inputs, *(subject.inputs(case, bench.device, seed) for seed in range(1, count))]
    calls: dict[str, list[Call]] = {}
    for name, side in sides.items():
        if "error" in found[name]:
            try:
                calls[name] = [side.prepare(each) for each in batch]
            except RuntimeError as error:  # a peer's own layout may not fit so many times
                bench.alive()
                found[name] = {"failed": one_line(error)}
    for name, timed in timings(calls, bench).items():
        if isinstance(timed, str):
            found[name] = {"failed": timed}
        elif sides[name].steady and (wrong := faults(wanted(sides[name]), bench.timer.outputs[name])):
            found[name] = {"refused": f"after it was timed, {wrong}"}
        else:
            found[name] |= timed | {"in cache": count * one < 2 * bench.l2}
    bench.timer.outputs = {}
    return row | {"sides": found}


def faults(expected: Sequence[Expected], output: Any) -> str:
    """What is wrong with an output, or nothing."""
    return "; ".join(str(verdict) for part in expected if not (verdict := part.verdict(output)).ok)


def checked(side: Side, inputs: Any, wanted: Callable[[Side], Sequence[Expected]], bench: Bench) -> dict[str, Any]:
    """{"error": how far it is off} if it passed, otherwise {"missing" or "failed" or "refused": why}."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            output = side.prepare(inputs)()
            verdicts = [part.verdict(output) for part in wanted(side)]
            wrong = "; ".join(str(verdict) for verdict in verdicts if not verdict.ok)
        except MissingError as reason:
            return {"missing": str(reason)}
        except (Exception, torch.cuda.OutOfMemoryError) as error:
            bench.alive()
            hints = [str(each.message).splitlines()[0] for each in said if issubclass(each.category, UserWarning)]
            return {"failed": one_line(error) + (f" ({hints[-1][:120]})" if hints else "")}
    if wrong:
        return {"refused": wrong}
    return {"error": {verdict.name: [verdict.rms, verdict.max] for verdict in verdicts}}


def timings(calls: dict[str, list[Call]], bench: Bench) -> dict[str, dict[str, Any] | str]:
    """All sides in turn; while that fails, for want of memory say, without the last of them, which is taken out."""
    found: dict[str, dict[str, Any] | str] = {}
    while calls:
        try:
            return found | {name: asdict(timed) for name, timed in bench.timer(calls).items()}
        except RuntimeError as error:
            bench.alive()
            last = list(calls)[-1]
            found[last] = f"not beside the others: {one_line(error)}"
            del calls[last]
        bench.tidy()
    return found


# ----------------------------------------------------------------------------- all of them


def plan(subjects: Sequence[Subject[Any]], most: int | None = None) -> list[tuple[Subject[Any], Case]]:
    """Cases of all subjects, the most important first, up to importance `most`."""
    entries = [(subject, case) for subject in subjects for case in subject.cases()]
    chosen = [entry for entry in entries if most is None or entry[1].importance <= most]
    return sorted(chosen, key=lambda entry: entry[1].importance)


@dataclass
class Budget:
    """Minutes that may be spent, if they are limited."""

    minutes: float | None
    now: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.begun = self.now()
        self.taken: list[float] = []

    def allows_another(self) -> bool:
        """Whether a case like the slower ones so far would end in time."""
        if self.minutes is None:
            return True
        likely = statistics.quantiles(self.taken, n=4)[2] if len(self.taken) > 1 else sum(self.taken)
        return self.now() - self.begun + likely < 60 * self.minutes


@dataclass
class Ending:
    """How a run ended: cases measured, cases left, and why they are left."""

    measured: int
    left: int
    why: str = ""
    failed: bool = False


def run(
    entries: Sequence[tuple[Subject[Any], Case]],
    bench: Bench,
    results: Results,
    folder: Path,
    *,
    facts: dict[str, Any],
    budget: Budget | None = None,
    roof_sizes: tuple[float, int] = (roofs.GIGABYTES, roofs.SIDE),
    say: Callable[[Row | None, int], None] = lambda row, done: None,
) -> Ending:
    """Measure the roofs and then the cases; the file in `folder` is written after each.

    Args:
        entries: (subject, case), in order.
        bench: Where.
        results: What is known already, to be added to.
        folder: Where `<device>.json` goes.
        facts: Of this run: commit, driver …
        budget: Minutes; the roofs count too.
        roof_sizes: Gigabytes read, and side of the matrices.
        say: Told of every row and how many are done; first of None, when the roofs are known.
    """
    budget = budget or Budget(None)
    measured = roofs.measure(bench.timer, bench.device, *roof_sizes)
    bench.tidy()
    current = results.begin(
        {"date": machine.today(), "versions": versions(), **facts, "roofs": asdict(measured), "clocks": {}}
    )
    say(None, 0)
    done = 0
    try:
        for subject, case in entries:
            if not budget.allows_another():
                return Ending(done, len(entries) - done, "the minutes are spent")
            begin = budget.now()
            try:
                row = measure(subject, case, bench)
            except DeviceLostError:
                raise
            except Exception as error:  # a fault of one case, want of memory mostly, ought not to cost the others
                bench.alive()
                row = without_figures(subject, case, one_line(error))
            bench.tidy()
            results.put(row | {"run": current["id"]})
            current["clocks"] = summary(bench.timer.clocks)
            results.save(folder)
            done += 1
            budget.taken.append(budget.now() - begin)
            say(row, done)
    except KeyboardInterrupt:
        return Ending(done, len(entries) - done, "interrupted")
    except DeviceLostError as error:
        row = without_figures(*entries[done], f"the device was lost: {error}")
        results.put(row | {"run": current["id"]})
        results.save(folder)
        return Ending(done, len(entries) - done - 1, f"the device was lost at {row['label']}: {error}", failed=True)
    return Ending(done, 0)


def without_figures(subject: Subject[Any], case: Case, why: str) -> Row:
    """A row that says why."""
    axis = list(subject.axis(case))
    return {
        "subject": subject.name, "label": subject.label(case), "axis": axis, "fields": case.fields, "skipped": why
    }  # fmt: skip


def summary(seen: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """Least, median and greatest of every clock."""
    names = {name for each in seen for name in each}
    columns = {name: [each[name] for each in seen if name in each] for name in sorted(names)}
    return {name: [min(values), statistics.median(values), max(values)] for name, values in columns.items()}
