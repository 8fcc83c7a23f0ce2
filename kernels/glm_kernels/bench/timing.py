"""Seconds of a call: the sides in turn in one process, over inputs that are not in the cache, with their spread.

A side has one call for every copy of its inputs. Together the copies are several times as large as the device's last
cache, so that when a copy's turn comes again it has been pushed out. All calls of a side are captured in one CUDA
graph, whose replay costs the host nothing; what the calls give back is kept, so that each writes somewhere else. In
a round every side is replayed between two events, right after a replay that is not timed, while the device is busy.
The figure is the median over the rounds, the spread their tenth and ninetieth percentile.
"""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from glm_kernels.bench.machine import clocks
from glm_kernels.bench.peers import one_line
from glm_kernels.bench.subject import Call


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, tenth and ninetieth percentile over so many rounds.

    mode  "graph" (replayed), "stream" (launched one by one, where capture failed: see `note`) or "wall clock"
    """

    seconds: float
    low: float
    high: float
    rounds: int
    copies: int
    mode: str
    note: str = ""

    @property
    def spread(self) -> float:
        """Half of the way between the percentiles, in medians."""
        return (self.high - self.low) / 2 / self.seconds


def timing(samples: Sequence[float], copies: int, mode: str, note: str = "") -> Timing:
    """The figures of a side's rounds."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    low, high = ordered[round(0.1 * last)], ordered[round(0.9 * last)]
    return Timing(statistics.median(ordered), low, high, len(ordered), copies, mode, note)


class Timer(Protocol):
    """Times sides against one another.

    clocks   seen so far
    outputs  of the last sides timed: what their first call gave in the last round
    """

    clocks: list[dict[str, float]]
    outputs: dict[str, Any]

    def __call__(self, sides: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        """Name of a side -> its timing; each side is given as its calls, one for every copy of the inputs."""
        ...


MOST_COPIES = 512
CACHES = 3  # the copies together are so many times the last cache
ALONE = 40  # a copy of so many last caches pushes itself out


def copies(one: float, l2: float, free: float) -> int:
    """How many copies of inputs and outputs of `one` bytes to rotate through, where `free` bytes may be used."""
    wanted = max(2, math.ceil(CACHES * l2 / max(one, 1))) if one < ALONE * l2 else 1
    return max(1, min(wanted, MOST_COPIES, int(free // max(one, 1))))


@dataclass
class Captured:
    """A graph of all calls of a side, or the calls themselves where they cannot be captured."""

    calls: Sequence[Call]
    graph: Any = None
    kept: Any = None
    note: str = ""

    def replay(self) -> None:
        """Every call once."""
        if self.graph is not None:
            self.graph.replay()
        else:
            for call in self.calls:
                call()


class GraphTimer:
    """On a GPU.

    rounds   at most, and at least
    seconds  that one side's rounds may take
    least    seconds of one round, below which a replay is repeated
    """

    def __init__(self, rounds: tuple[int, int] = (25, 7), seconds: float = 1.0, least: float = 1e-3) -> None:
        self.rounds, self.seconds, self.least = rounds, seconds, least
        self.clocks: list[dict[str, float]] = []
        self.outputs: dict[str, Any] = {}

    def __call__(self, sides: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        """See the head of this file."""
        graphs = {name: captured(calls) for name, calls in sides.items()}
        plans = {}
        for name, graph in graphs.items():
            warm(graph)
            once = elapsed(graph, 1)
            repeats = max(1, math.ceil(self.least / once))
            most, fewest = self.rounds
            plans[name] = repeats, min(most, max(fewest, int(self.seconds / (once * repeats))))
        samples: dict[str, list[float]] = {name: [] for name in graphs}
        for turn in range(max((rounds for _, rounds in plans.values()), default=0)):
            for name, graph in graphs.items():
                repeats, rounds = plans[name]
                if turn < rounds:
                    samples[name].append(elapsed(graph, repeats) / (repeats * len(graph.calls)))
        if graphs:
            self.look(next(iter(graphs.values())))
        self.outputs = {name: graph.kept[0] if graph.graph else graph.calls[0]() for name, graph in graphs.items()}
        return {
            name: timing(samples[name], len(graph.calls), "graph" if graph.graph else "stream", graph.note)
            for name, graph in graphs.items()
        }

    def look(self, graph: Captured, seconds: float = 0.1) -> None:
        """Note the clocks while the device works."""
        once = elapsed(graph, 1)
        for _ in range(min(10_000, math.ceil(seconds / once))):
            graph.replay()
        seen = clocks(torch.device("cuda", torch.cuda.current_device()))
        torch.cuda.synchronize()
        if seen:
            self.clocks.append(seen)


def captured(calls: Sequence[Call]) -> Captured:
    """Run once for whatever is compiled at first use, then capture; a side that refuses is launched call by call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            kept = [call() for call in calls]
        return Captured(calls, graph, kept)
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises where the device itself is in trouble
        return Captured(calls, note=f"not captured ({one_line(error)})")


def warm(graph: Captured, seconds: float = 0.05) -> None:
    """Keep the device busy for a while: clocks go up under load."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        graph.replay()
        torch.cuda.synchronize()


def elapsed(graph: Captured, repeats: int) -> float:
    """Seconds of so many replays, after one more that hides how long the host takes to start."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return max(float(begin.elapsed_time(end)) / 1e3, 1e-9)


class WallClock:
    """On the CPU, where only the pipeline is tried: seconds of the host."""

    def __init__(self, rounds: int = 3) -> None:
        self.rounds = rounds
        self.clocks: list[dict[str, float]] = []
        self.outputs: dict[str, Any] = {}

    def __call__(self, sides: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        """All sides in turn, a few times."""
        self.outputs = {}
        samples: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(self.rounds):
            for name, calls in sides.items():
                begin = time.perf_counter()
                first, *_ = [call() for call in calls]
                samples[name].append((time.perf_counter() - begin) / len(calls))
                self.outputs[name] = first
        return {name: timing(samples[name], len(calls), "wall clock") for name, calls in sides.items()}
