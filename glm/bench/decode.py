"""Decoding: seconds of a step, bytes against the floor, and where the time goes.

Where a device can overlap kernels, the engine is measured both ways, as two sides of the same run.

Every turn begins with `context` tokens in each row. The engine reads prompts one by one while the rows before them
write already, so that with many rows its own are up to as many tokens longer than is counted.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from glm_kernels.bench import machine

from glm.bench import sides as every
from glm.bench.breakdown import breakdown
from glm.bench.cases import RuntimeCase
from glm.bench.goals import OURS
from glm.bench.prompts import prompts
from glm.bench.sides import CHUNK, EngineSide, Maker, Prompts, Setting, Side
from glm.bench.truth import Truth
from glm.bench.turns import Place, admitted, check_again, in_turn, lasting
from glm.bench.weights import random_model
from glm.bench.work import floor, moved

WARM = 4  # steps of a round before those that are timed
CHECKED, WRITTEN = 40, 8  # tokens of the prompts that sides are checked on, and of the answers
PROFILED = 8


def measure(case: RuntimeCase, place: Place, makers: Mapping[str, Maker] | None = None) -> dict[str, Any]:
    """The figures of a case: of every side seconds of a step; of ours bytes, kernels and their times."""
    model = random_model(case, place.device)
    rows = case.batch
    ahead = rows * (1 + -(-case.context // CHUNK))  # tokens that the first row writes while the others are read
    room = case.context + WARM + max(place.steps, PROFILED) + ahead + 16
    setting = Setting(model, case, max(room, CHECKED + WRITTEN + ahead + 16))
    truth = Truth(model, prompts(case.spec, rows, min(CHECKED, case.context), 1), WRITTEN)
    if makers is None:
        makers = {**every.makers(), **every.overlapped(place.device)}
    sides, found = admitted(makers, setting, truth, place)
    texts = prompts(case.spec, rows, case.context, 2)

    def step(side: Side, turn: int) -> float:
        side.start(texts)
        steps(side, WARM)
        return lasting(partial(steps, side, place.steps), place.device) / place.steps

    in_turn(sides, found, place, step)
    check_again(sides, found, truth, place)
    tokens = case.context + WARM + (place.steps + 1) / 2  # of a row, in the middle of a round
    row: dict[str, Any] = {"bytes": floor(case.spec, case.torch_dtype, rows, tokens), "tokens": rows, "sides": found}
    ours = sides.get(OURS)
    if isinstance(ours, EngineSide) and "seconds" in found[OURS]:
        row["moved"] = moved(ours.engine, case, tokens)
        ours.start(texts)
        steps(ours, WARM)
        try:
            row["kernels"] = breakdown(partial(steps, ours, PROFILED), PROFILED, place.device)
        except Exception as error:  # a profiler that may not look at the device costs the table, not the figures
            row["kernels"] = {"failed": place.survived(error)}
        if place.device.type == "cuda":
            row["clocks"] = clocks(ours, texts, place.device)
    return row


def clocks(side: Side, texts: Prompts, device: torch.device) -> dict[str, float]:
    """Of the device while it decodes."""
    with ThreadPoolExecutor(1) as other:
        seen = other.submit(machine.clocks, device)
        while not seen.done():
            side.start(texts)
            steps(side, PROFILED)
    return seen.result()


def steps(side: Side, count: int) -> None:
    """So many."""
    for _ in range(count):
        side.step()
