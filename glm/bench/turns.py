"""Sides in turn: who may be timed, and seconds of each, round by round.

What is timed is what a caller waits for, by the clock of the host, from one moment when the device has nothing to do
to the next: so launches, copies and whatever python does between steps are in it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from glm_kernels.bench.peers import one_line
from glm_kernels.bench.run import Bench
from glm_kernels.bench.subject import MissingError
from glm_kernels.bench.timing import WallClock, timing

from glm.bench.sides import Maker, Setting, Side, wait
from glm.bench.truth import Truth

ROUNDS = 5
Found = dict[str, dict[str, Any]]  # of every side its figures, or {"missing" or "failed" or "refused": why}


@dataclass
class Place:
    """Where it is measured, and how often; fewer `rounds` and `steps` are quicker and less certain."""

    device: torch.device
    rounds: int = ROUNDS
    steps: int = 64

    def __post_init__(self) -> None:
        self.bench = Bench(self.device, WallClock(), 0, 0)

    def survived(self, error: BaseException) -> str:
        """An error in a line. Raises DeviceLostError where the device does not answer any more."""
        self.bench.alive()
        self.bench.tidy()
        return one_line(error)


def admitted(
    makers: Mapping[str, Maker], setting: Setting, truth: Truth, place: Place
) -> tuple[dict[str, Side], Found]:
    """The sides that passed the check, and of the others why not."""
    sides: dict[str, Side] = {}
    found: Found = {}
    for name, make in makers.items():
        try:
            side = make(setting)
            if wrong := truth.faults(side):
                found[name] = {"refused": wrong}
            else:
                sides[name], found[name] = side, {}
        except MissingError as reason:
            found[name] = {"missing": str(reason)}
        except Exception as error:  # a peer fails in any way at all, want of memory among them
            found[name] = {"failed": place.survived(error)}
    return sides, found


def in_turn(sides: Mapping[str, Side], found: Found, place: Place, seconds: Callable[[Side, int], float]) -> None:
    """`seconds(side, round)` of every side, round by round, into `found`; the first round is not counted."""
    samples: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-1, place.rounds):
        for name, side in sides.items():
            if "failed" in found[name]:
                continue
            try:
                taken = seconds(side, turn)
            except Exception as error:
                found[name] = {"failed": place.survived(error)}
                continue
            if turn >= 0:
                samples[name].append(taken)
    for name, counted in samples.items():
        if counted and "failed" not in found[name]:
            found[name] |= asdict(timing(counted, 1, "wall clock"))


def check_again(sides: Mapping[str, Side], found: Found, truth: Truth, place: Place) -> None:
    """Take its figure from a side that was right only at first."""
    for name, side in sides.items():
        if "seconds" not in found[name]:
            continue
        try:
            if wrong := truth.faults(side):
                found[name] = {"refused": f"after it was timed, {wrong}"}
        except Exception as error:
            found[name] = {"failed": place.survived(error)}


def lasting(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of `run`, the device included."""
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - begin
