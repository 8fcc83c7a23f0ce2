"""Sides: the engine, and whatever stands beside it, each behind the same few calls.

All sides hold the same tensors where they can, so that dense weights are in memory once. A side that cannot be had
says so by MissingError; one that fails in any other way shows as failed. Neither stops the others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from glm.bench.cases import RuntimeCase
from glm.bench.goals import EAGER, GPT_FAST, OURS, STATIC
from glm.bench.routes import Routes
from glm.model import GLM
from glm.runtime import Engine, Request
from glm.runtime.decoding import Outcome, advance, read
from glm.runtime.sampling import Choice

CHUNK = 8192  # tokens of a prompt that the engine reads at once

Prompts = Sequence[Sequence[int]]


class Side(Protocol):
    """One way to run the model of a case."""

    def logits(self, prompt: Sequence[int]) -> Tensor:
        """Of every token of a text, [T, V]."""
        ...

    def start(self, prompts: Prompts) -> None:
        """Forget what was, read a prompt for each row, and choose the first token of each."""
        ...

    def step(self) -> None:
        """One more token for every row. May return before the device is done."""
        ...

    def tokens(self) -> list[list[int]]:
        """What was chosen since the start, by row, as far as it is known."""
        ...

    def next_logits(self) -> Tensor:
        """Behind everything that `tokens` says, read from the cache that the steps wrote: [B, V].

        A step may not follow, a start may.
        """
        ...

    def prefill(self, prompt: Sequence[int]) -> None:
        """Read one prompt that nothing is remembered of, up to its first token."""
        ...


@dataclass(frozen=True)
class Setting:
    """The model all sides run, the case, and for how many tokens a row must have room."""

    model: GLM
    case: RuntimeCase
    length: int


Maker = Callable[[Setting], Side]


def makers() -> Mapping[str, Maker]:
    """All sides, ours first."""
    from glm.bench.huggingface import Eager, Static
    from glm.bench.stock import Stock

    return {OURS: EngineSide, GPT_FAST: Stock, EAGER: Eager, STATIC: Static}


class SeenEngine(Engine):
    """An engine that tells `routes`, while there are any, when experts were chosen; no step is replayed meanwhile."""

    routes: Routes | None = None

    def piece(self, request: Request, slot: int) -> tuple[Tensor, bool]:
        """Of a prompt."""
        start = request.read
        found = super().piece(request, slot)
        if self.routes is not None:
            self.routes.read(slot, start)
        return found

    def advance(self, rows: int, choice: Choice) -> Outcome:
        """A step."""
        if self.routes is None:
            return super().advance(rows, choice)
        found = advance(self.composed, self.slots, self.rows, rows, choice)
        self.routes.wrote(list(self.seats.writing()))
        return found


class EngineSide:
    """The engine."""

    def __init__(self, setting: Setting) -> None:
        case = setting.case
        self.model = setting.model
        self.engine = SeenEngine(setting.model, max_batch=case.batch, max_length=setting.length, chunk=CHUNK)
        self.requests: list[Request] = []

    @contextmanager
    def routes(self) -> Iterator[Routes]:
        """The experts that are chosen, by slot. Nothing that was read before or meanwhile is remembered."""
        engine = self.engine
        self.forget()
        with Routes(self.model).seen() as engine.routes:
            try:
                yield engine.routes
            finally:
                engine.routes = None
                self.forget()

    def forget(self) -> None:
        """All that slots remember."""
        self.clear()
        self.engine.seats.texts = [[] for _ in self.engine.seats.texts]

    def slots(self) -> list[int]:
        """Where the rows are, in the order of their prompts."""
        return [self.engine.seats.holders.index(request) for request in self.requests]

    def logits(self, prompt: Sequence[int]) -> Tensor:
        """[T, V]."""
        self.clear()
        return self.engine.read(prompt)

    def start(self, prompts: Prompts) -> None:
        """Rows that were read first write on while others are read."""
        self.clear()
        room = self.engine.max_length
        self.requests = [self.engine.submit(p, max_new_tokens=room - len(p), stop=()) for p in prompts]
        while any(request.state in ("waiting", "reading") for request in self.requests):
            self.step()

    def step(self) -> None:
        """Raises what stopped a request; RuntimeError where one has no room left."""
        self.engine.step()
        for request in self.requests:
            if not request.active:
                raise request.error or RuntimeError("a row has no room left")

    @torch.inference_mode()
    def tokens(self) -> list[list[int]]:
        """By row, with those that the device is about to give."""
        while self.engine.pending:
            self.engine.settle(self.engine.pending.popleft())
        return [request.ids for request in self.requests]

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """What the next step would choose from."""
        engine, rows = self.engine, self.engine.rows
        logits = engine.composed.logits(read(engine.composed, engine.slots, rows, rows.token[:, None]))[:, -1]
        if engine.routes is not None:
            engine.routes.wrote(list(engine.seats.writing()))
        return logits

    def prefill(self, prompt: Sequence[int]) -> None:
        """One request of one token."""
        self.clear()
        request = self.engine.submit(prompt, max_new_tokens=1, stop=())
        while request.active:
            self.engine.step()
        if request.error is not None:
            raise request.error

    def clear(self) -> None:
        """No requests."""
        for request in self.requests:
            self.engine.cancel(request)
        self.requests = []


def wait(device: torch.device) -> None:
    """Until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def shared_copy(module: torch.nn.Module) -> torch.nn.Module:
    """The same modules once more, with the same tensors."""
    from copy import deepcopy

    tensors = (*module.parameters(), *module.buffers())
    return deepcopy(module, {id(x): x for x in tensors})
