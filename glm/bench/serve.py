"""Serving: requests arrive when they like, of any length, and are answered side by side.

Arrivals are a Poisson process, prompts have a quarter of the context to all of it, answers 16 tokens to a quarter; all
of it from one seed. A request waits from the moment it was due, whether or not the engine was ready to be asked. What
is done once in a process, compiling kernels and recording the step of every number of rows, is done before.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from glm.bench.cases import RuntimeCase
from glm.bench.decode import CHECKED, WRITTEN
from glm.bench.goals import OURS
from glm.bench.prompts import prompts
from glm.bench.sides import EngineSide, Maker, Prompts, Setting, wait
from glm.bench.truth import Truth
from glm.bench.turns import Place, admitted
from glm.bench.weights import random_model
from glm.runtime import Engine, Request

SHORT = 16


@dataclass
class Guest:
    """One request: when it is due, what it asks for, and when its tokens came, in seconds."""

    due: float
    prompt: list[int]
    tokens: int
    request: Request | None = None
    came: list[float] = field(default_factory=list)


def guests(case: RuntimeCase, seed: int = 0) -> list[Guest]:
    """All that will come."""
    dice = random.Random(seed)
    due, found = 0.0, []
    for number in range(case.count):
        due += dice.expovariate(case.rate)
        length = dice.randint(max(2, case.context // 4), case.context)
        answer = dice.randint(min(SHORT, max(1, case.context // 4)), max(SHORT, case.context // 4))
        found.append(Guest(due, prompts(case.spec, 1, length, 5000 + number)[0], answer))
    return found


def served(
    engine: Engine, all_guests: Sequence[Guest], now: Callable[[], float], rest: Callable[[float], None]
) -> list[int]:
    """Answer them all as they come; how many waited, at every step. `now` and `rest` are a clock's.

    Raises what stopped a request.
    """
    begin = now()
    coming = sorted(all_guests, key=lambda guest: guest.due, reverse=True)
    here: list[Guest] = []
    queue: list[int] = []
    while coming or here:
        while coming and coming[-1].due <= now() - begin:
            guest = coming.pop()
            guest.request = engine.submit(guest.prompt, max_new_tokens=guest.tokens, stop=())
            here.append(guest)
        if not here:
            rest(max(0.0, coming[-1].due - (now() - begin)))
            continue
        engine.step()
        queue.append(sum(guest.request is not None and guest.request.state == "waiting" for guest in here))
        moment = now() - begin
        for guest in here:
            assert guest.request is not None
            if guest.request.error is not None:
                raise guest.request.error
            guest.came += [moment] * (len(guest.request.ids) - len(guest.came))
        here = [guest for guest in here if guest.request is not None and guest.request.active]
    return queue


def measure(case: RuntimeCase, place: Place, maker: Maker = EngineSide) -> dict[str, Any]:
    """The figures of a case."""
    model = random_model(case, place.device)
    everybody = guests(case)
    room = max(len(guest.prompt) + guest.tokens for guest in everybody)
    setting = Setting(model, case, max(room, CHECKED + WRITTEN + case.batch) + 16)
    truth = Truth(model, prompts(case.spec, case.batch, min(CHECKED, case.context), 1), WRITTEN)
    sides, found = admitted({OURS: maker}, setting, truth, place)
    if OURS not in sides:
        return {"sides": found}
    side = sides[OURS]
    assert isinstance(side, EngineSide)
    rehearse(side, [guest.prompt for guest in everybody])
    wait(place.device)
    queue = served(side.engine, everybody, time.perf_counter, time.sleep)
    found[OURS] = figures(everybody, queue)
    return {"tokens": sum(guest.tokens for guest in everybody), "sides": found}


def rehearse(side: EngineSide, texts: Prompts) -> None:
    """A step of 1, 2, 4 … rows up to all there are, behind as many of the prompts, of which nothing stays."""
    most = side.engine.max_batch
    for rows in sorted({min(2**power, most) for power in range(most.bit_length() + 1)}):
        side.start([texts[row % len(texts)] for row in range(rows)])
        side.step()
    side.forget()


def figures(everybody: Sequence[Guest], queue: Sequence[int]) -> dict[str, Any]:
    """Seconds from the first arrival to the last token, and what requests waited for: median and 95th percentile."""
    first = [guest.came[0] - guest.due for guest in everybody]
    between = [b - a for guest in everybody for a, b in zip(guest.came, guest.came[1:], strict=False)]
    seconds = max(guest.came[-1] for guest in everybody) - min(guest.due for guest in everybody)
    return {
        "seconds": seconds,
        "tokens/s": sum(len(guest.came) for guest in everybody) / seconds,
        "first": [percentile(first, 50), percentile(first, 95)],
        "between": [percentile(between, 50), percentile(between, 95)],
        "queue": {"mean": statistics.fmean(queue), "most": max(queue)},
        "requests": len(everybody),
    }


def percentile(values: Sequence[float], of: int) -> float:
    """The least value that so many percent of them do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-of * len(ordered) // 100) - 1)] if ordered else 0.0
