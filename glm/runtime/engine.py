"""The engine: requests in, tokens out, many side by side.

    engine = glm.Engine(model, max_batch=8, max_length=4096)
    new = engine.generate(prompts, max_new_tokens=200)

    request = engine.submit(prompt, max_new_tokens=200, temperature=0.8, seed=1)
    while request.active:
        engine.step()

A step reads a piece of new prompts, if there are any, and gives every request that is writing its next token: so
requests join and leave between steps (continuous batching: Yu et al. 2022, Orca). Each has a slot of the cache, its
own length, rules and dice; what it says does not depend on its neighbours, up to the rounding of products with more or
fewer rows. The tokens are those of `glm.generate` with the same arguments.

On a GPU a step is one recorded graph for each number of rows, 1, 2, 4 and so on; all that it needs to know lies on the
device, and the host reads nothing but ids, one step behind the device.
"""

from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

import torch
from glm_kernels import overlapping
from glm_kernels.acceptance import REJECTED
from torch import Tensor

from glm.drafting import Drafter
from glm.errors import CacheError, GenerationError, LayoutError
from glm.generation import Decode, Ending, Row, Sampler, checked, thrown
from glm.layout import Blank, Layout
from glm.model import GLM
from glm.runtime.call import Call, Prompt
from glm.runtime.composed import Composed
from glm.runtime.decoding import Outcome, advance
from glm.runtime.matrices import integer_form, lays_out
from glm.runtime.recording import Recording
from glm.runtime.requests import Request
from glm.runtime.rows import Rows
from glm.runtime.sampling import Choice, choice_of, chosen
from glm.runtime.seats import Seats
from glm.runtime.slots import Slots
from glm.spec import Spec
from glm.tensor_file import Progress

GREEDY, NEVER = Sampler(0, 0, 1, 1), Ending.of((), (), None, False)
CHUNK = 2048  # tokens of a prompt that are read at once, while others wait for their next token


@dataclass(frozen=True)
class Pending:
    """A step that the device was given: who wrote in which slot, and where its outcome will be when `ready`."""

    writers: dict[int, Request]
    outcome: Outcome
    ready: "torch.cuda.Event | None"


class Engine:
    """A second composition of a model's parameters, for speed; see the top of this file."""

    def __init__(
        self,
        model: GLM,
        *,
        max_batch: int = 1,
        max_length: int | None = None,
        weights: str | None = None,
        chunk: int = CHUNK,
        draft: Drafter | None = None,
        release: bool = False,
        overlap: bool = False,
    ) -> None:
        """Memory for `max_batch` requests of `max_length` tokens, prompt and answer together, is taken here, once.

        max_length  None is the model's context, at most 8192.
        weights     "int8" or "int4" makes such of dense matrices, in groups of 128; "bf16" leaves dense ones in the
                    model's dtype, whichever that is; None takes matrices of any kind as they are.
        chunk       tokens of a prompt that are read at once; a model that reads in both directions reads all at once.
        draft       guesses ahead for every request; the ids are the same, they come in fewer steps. See `glm.drafting`.
        release     let go of the model's blocks while composing: memory for one block more, not for a second model.
        overlap     kernels of a step begin, and fetch their weights, while those before them still run; the ids are
                    the same. Takes a CUDA device of compute capability 9.0 or later and has no effect on any other.

        Raises GenerationError for sizes out of range, ConfigError for a model dealt out to several processes.
        """
        length = min(model.spec.context, 8192) if max_length is None else max_length
        for name, value in (("max_batch", max_batch), ("max_length", length), ("chunk", chunk)):
            if not isinstance(value, int) or value < 1:
                raise GenerationError(f"{name} is a whole number from 1, not {value}")
        self.spec, self.dtype, self.device = model.spec, model.dtype, model.device
        self.max_batch, self.max_length, self.chunk, self.draft = max_batch, length, chunk, draft
        self.overlap = overlap
        self.guesses = 0 if draft is None else draft.guesses
        self.ahead = int(self.device.type == "cuda" and draft is None)  # steps given to the device before one is read
        self.model = model if draft is not None else None  # what a drafter is told it guesses for
        spare = self.guesses + self.ahead + 1
        with torch.no_grad():
            self.composed = Composed(model, length + spare, integer_form(weights, self.spec.weights), release=release)
            self.slots = Slots(
                [block.mixer.remembers for block in self.spec.blocks], max_batch, length, spare,
                dtype=self.dtype, device=self.device, prefix=self.composed.prefix,
            )  # fmt: skip
            self.rows = Rows.idle(
                max_batch, axes=len(self.spec.reading.step), guesses=self.guesses, length=length,
                vocabulary=self.spec.vocabulary, nowhere=self.slots.nowhere, device=self.device,
            )  # fmt: skip
        self.waiting: deque[Request] = deque()
        self.reading: Request | None = None
        self.seats = Seats(max_batch)
        self.pending: deque[Pending] = deque()
        self.recordings: dict[tuple[int, Choice], Recording[Outcome]] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    @classmethod
    def from_pretrained(
        cls,
        source: str | PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        prefix: str | PathLike[str] | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> "Engine":
        """The engine of a checkpoint folder or hub id, by default on a GPU if there is one; `options` as above.

        Where kernels compute with integers, they are read from the file that `glm prepack` wrote, if it is there; a
        warning says why where it cannot be used. Kernels are compiled at their first call on a machine, and kept in
        Triton's cache: ~/.triton/cache, or $TRITON_CACHE_DIR.
        """
        from glm.pretrained import Opened
        from glm.runtime.prepacked import with_prepacked

        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        opened = Opened.of(source, dtype=dtype, revision=revision, prefix=prefix)
        if lays_out(opened.dtype, place):
            opened = with_prepacked(opened)
        return cls(opened.filled(place, progress), release=True, **options)

    # ------------------------------------------------------------------------- what a caller asks for

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Continue each of `prompts`; the arguments, results and errors are those of `glm.generate`.

        More prompts than `max_batch` take turns. CacheError for one that is too long for a slot.
        """
        requests = self.requests(prompts, max_new_tokens=max_new_tokens, **options)
        self.waiting.extend(request for request in requests if request.active)
        try:
            while any(request.active for request in requests):
                self.step()
                for request in requests:
                    if request.error is not None:
                        raise request.error
        finally:
            for request in requests:
                self.cancel(request)
        return [request.ids for request in requests]

    def stream(self, prompt: Sequence[int], *, max_new_tokens: int, **options: Any) -> Generator[int, None, None]:
        """The ids `generate` returns for one prompt, each as soon as it is certain; see there for the arguments.

        Closing the generator, or dropping it, frees the slot. Arguments are checked by the call itself.
        """
        [request] = self.requests([prompt], max_new_tokens=max_new_tokens, **options)

        def tokens() -> Generator[int, None, None]:
            if request.active:  # not before the first token is asked for: one never asked could not be dropped
                self.waiting.append(request)
            given = 0
            try:
                while True:
                    yield from request.ids[given:]
                    given = len(request.ids)
                    if request.error is not None:
                        raise request.error
                    if not request.active and given == len(request.ids):
                        return
                    self.step()
            finally:
                self.cancel(request)

        return tokens()

    def submit(self, prompt: Sequence[int], *, max_new_tokens: int, **options: Any) -> Request:
        """A request that `step` works on when its turn has come; the arguments are those of `generate`."""
        [request] = self.requests([prompt], max_new_tokens=max_new_tokens, **options)
        if request.active:
            self.waiting.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Nothing more of a request; its slot is free. One that is over stays as it is."""
        if request.active:
            self.leave(request, "cancelled")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together, as far as the release goes and a slot has room."""
        return min(self.spec.context, self.max_length)

    @property
    def bytes(self) -> int:
        """Memory of the cache, in bytes."""
        return self.slots.bytes

    @torch.inference_mode()
    def read(self, ids: Sequence[int], layout: Layout | None = None) -> Tensor:
        """Logits [T, V] of one text, as `model(ids, layout)` has them. Needs a free slot.

        Raises CacheError where there is none or it is too short, LayoutError for a layout of another kind than the rule
        of `glm/layout.py`, or with padding.
        """
        if len(ids) > self.max_length:
            raise CacheError(f"{len(ids)} tokens do not fit: a slot has room for {self.max_length}")
        if not self.seats.free():
            raise CacheError("every slot is taken: read when a request is over")
        slot = self.seats.free()[0]
        layout = self.spec.reading.read(torch.tensor([list(ids)])) if layout is None else by_rule(layout, len(ids))
        request = Request(list(ids), GREEDY, [], Row(0, NEVER), 0, with_step(layout, self.spec))
        parts = []
        while request.read < len(ids):
            x, _ = self.piece(request, slot)
            parts.append(self.composed.logits(x)[0])
        logits = torch.cat(parts)
        if not bool(logits.isfinite().all()):
            self.forget(slot)
        return logits

    # ------------------------------------------------------------------------- requests

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop: int | Iterable[int] | None = None,
        stop_text: str | Iterable[str] = (),
        decode: Decode | None = None,
        keep_stop: bool = False,
    ) -> list[Request]:
        """One of each prompt. Raises CacheError, and what `generate` raises, for what cannot be answered."""
        sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
        ending = Ending.of(self.spec.stop if stop is None else stop, stop_text, decode, keep_stop)
        texts = checked(self.spec, prompts, max_new_tokens, None)
        dice = thrown(texts, seed) if sampler.temperature else [None] * len(texts)
        requests = []
        for number, (text, die) in enumerate(zip(texts, dice, strict=True)):
            if len(text) + max_new_tokens > self.max_length:
                raise CacheError(
                    f"prompt {number} has {len(text)} tokens, and {max_new_tokens} new ones are asked for: the "
                    f"{self.max_length} of a slot are too few. Make an engine with a larger max_length, or ask for less"
                )
            layout = with_step(self.spec.reading.read(torch.tensor([text])), self.spec)
            luck = [] if die is None else [die.random() for _ in range(max_new_tokens)]
            request = Request(text, sampler, luck, Row(number, ending), max_new_tokens, layout)
            self.require_places(request)
            if max_new_tokens == 0:
                request.state = "done"
            requests.append(request)
        return requests

    def require_places(self, request: Request) -> None:
        """Raise LayoutError for a request that would need positions which the model has not learnt, or never began."""
        if request.max_new_tokens > 1 and request.layout.reading:
            raise LayoutError("what is read sees all of itself: give it in one call up to and with its start token")
        if self.spec.learned is not None:
            highest = int(request.positions(0, len(request.prompt) + max(request.max_new_tokens - 1, 0)).max())
            if highest >= self.spec.learned.length:
                raise LayoutError(
                    f"position {highest} is none of the {self.spec.learned.length} the model learnt: shorten the text"
                )

    def leave(self, request: Request, state: Any, error: Exception | None = None) -> None:
        """A request is over, however that came."""
        request.state, request.error = state, error
        with suppress(ValueError):
            self.waiting.remove(request)
        if self.reading is request:
            self.reading = None
        slot = self.seats.leave(request)
        if slot is not None:
            self.rows.rest(slot)
            if state == "failed":
                self.forget(slot)
        request.guess, request.stream = None, []

    def forget(self, slot: int) -> None:
        """Numbers that are not finite must not outlive the request that made them."""
        self.slots.clear(slice(slot, slot + 1))
        self.seats.texts[slot] = []

    @property
    def reusable(self) -> bool:
        """Whether a prompt can build on what a slot remembers.

        What is read in both directions depends on all that is read, and a drafter is to be told of the whole prompt.
        """
        return not isinstance(self.spec.reading, Blank) and self.draft is None

    # ------------------------------------------------------------------------- a step

    @torch.inference_mode()
    def step(self) -> None:
        """Read `chunk` tokens of new prompts, if there are any, and give every request that writes a token or more."""
        left = self.chunk
        while left > 0 and (request := self.next_to_read()):
            left -= self.read_on(request)
        if self.draft is not None:
            self.guess(self.seats.writing(), self.draft)
        writers = self.seats.writing()
        if writers:
            self.pending.append(self.launch(writers))
        while len(self.pending) > (self.ahead if writers else 0):
            self.settle(self.pending.popleft())

    def next_to_read(self) -> Request | None:
        """The request whose prompt is being read, or else the next one that waits, if there is a slot for it."""
        if self.reading is None and self.waiting and self.seats.take(self.waiting[0], self.reusable) is not None:
            self.reading = self.waiting.popleft()
            self.reading.state = "reading"
        return self.reading

    def read_on(self, request: Request) -> int:
        """One more piece of a prompt, behind the last of which stands the first new token; how many tokens it had."""
        slot, before = self.seats.holders.index(request), request.read
        try:
            x, last = self.piece(request, slot)
            if self.draft is not None:
                request.stream.append(self.composed.final(x))
            if last:
                self.begin(request, slot, x)
        except Exception as error:  # memory, most likely: the others go on
            self.leave(request, "failed", error)
        return max(request.read - before, 1)

    def piece(self, request: Request, slot: int) -> tuple[Tensor, bool]:
        """The stream [1, t, D] of the next piece of a prompt, and whether it is the last; its keys are in the cache."""
        start = request.read
        end = min(len(request.prompt), max(start + self.chunk, request.prefix))  # what all see is read at once
        x = self.composed(*self.excerpt(request, slot, start, end))
        request.read = end
        self.seats.texts[slot] = request.prompt[:end]
        return x, end == len(request.prompt)

    def excerpt(self, request: Request, slot: int, start: int, end: int) -> tuple[Tensor, Tensor, Call, Any]:
        """What reads tokens `start` to `end` of a request in a slot: ids [1, T], positions [1, T, A], call, memory."""
        before = self.slots.before
        tokens = torch.tensor([request.text[start:end]], device=self.device)
        positions = request.positions(start, end - start).to(self.device)
        prefix = None if request.prefix == 0 else torch.tensor([before + request.prefix], device=self.device)
        at, length = (torch.tensor([before + n], dtype=torch.int32, device=self.device) for n in (start, end))
        call = Call(at, length, self.composed.turns.computed(positions), Prompt(before + end, prefix))
        return tokens, positions, call, self.slots.of(slice(slot, slot + 1))

    def begin(self, request: Request, slot: int, x: Tensor) -> None:
        """The prompt is read: choose the first new token from its stream [1, t, D], and let the row go on by itself."""
        self.reading, request.state = None, "writing"
        rows, length = self.rows, len(request.prompt)
        rows.begin(slot, request.sampler, request.luck, request.prompt)
        one = slice(slot, slot + 1)
        logits, choice = self.composed.logits(x[:, -1:]), choice_of([request.sampler])
        [[new]] = chosen(logits, rows.tokens[one, :1], rows.rules.rows(one), rows.count[one], choice).tolist()
        rows.go_on(slot, max(new, 0), self.slots.before + length, request.positions(length, 1)[0, 0], request.step)
        if self.draft is not None:
            assert self.model is not None
            ids = torch.tensor([request.prompt], device=self.device)
            room = length + request.max_new_tokens
            request.guess = self.draft.start(self.model, ids, torch.ones_like(ids, dtype=torch.bool), room)
            request.told = 1
        self.give(request, slot, [new])

    def launch(self, writers: dict[int, Request]) -> Pending:
        """Give the device its next step."""
        rows = 1
        while rows <= max(writers):
            rows *= 2
        rows = min(rows, self.max_batch)
        outcome = self.advance(rows, choice_of([request.sampler for request in writers.values()]))
        if self.device.type != "cuda":
            return Pending(writers, outcome, None)
        ids = torch.empty(outcome.ids.shape, dtype=torch.long, pin_memory=True)
        ids.copy_(outcome.ids, non_blocking=True)  # the next replay writes to the same place
        ready = torch.cuda.Event()
        ready.record(torch.cuda.current_stream(self.device))
        return Pending(writers, Outcome(ids, outcome.stream), ready)

    def advance(self, rows: int, choice: Choice) -> Outcome:
        """A step of the first `rows` rows, from its recording."""
        key = rows, choice
        if key not in self.recordings:
            step = partial(advance, self.composed, self.slots, self.rows, *key)
            step = overlapping()(step) if self.overlap else step
            self.recordings[key] = Recording(step, self.warm_up, self.device, self.pool)
        return self.recordings[key]()

    def settle(self, pending: Pending) -> None:
        """Read what a step gave, and tell the requests."""
        if pending.ready is not None:
            pending.ready.synchronize()
        ids = pending.outcome.ids.tolist()
        for slot, request in pending.writers.items():
            if request.state != "writing":
                continue  # it ended while the device was one step ahead
            self.seats.texts[slot] = request.text
            kept = [id for id in ids[slot] if id != REJECTED]
            if self.draft is not None:
                self.draft.tally.right += len(kept) - 1
                request.stream = [self.composed.final(pending.outcome.stream[slot : slot + 1, : len(kept)])]
            try:
                self.give(request, slot, kept)
            except Exception as error:  # of a decode that cannot read the ids, say: the others have their tokens
                self.leave(request, "failed", error)

    def give(self, request: Request, slot: int, ids: list[int]) -> None:
        """New ids for a request, in order; negative where the logits were not finite."""
        row = request.row
        for id in ids:
            if id < 0:
                self.leave(request, "failed", self.not_finite(request, slot))
                return
            request.ids += row.take(id, last=len(row.ids) + 1 == request.max_new_tokens)
            if row.done:
                self.leave(request, "done")
                return

    # ------------------------------------------------------------------------- guesses

    def guess(self, writers: dict[int, Request], draft: Drafter) -> None:
        """Put guesses for every request that writes beside its newest token; each is told what is certain by now."""
        for slot, request in writers.items():
            assert request.guess is not None
            certain = torch.tensor([request.text[request.told :]], device=self.device)
            count = certain.shape[1]
            before = request.positions(request.told - 1, count).to(self.device)
            stream = torch.cat(request.stream, dim=1)[:, :count]
            layout = Layout.rule(before, request.told - 1 + count)
            try:
                found = request.guess(certain, stream, layout)[0, : self.guesses]
            except Exception as error:
                self.leave(request, "failed", error)
                continue
            request.told += count
            self.rows.guesses[slot] = certain[0, -1]
            self.rows.guesses[slot, : len(found)] = found
            draft.tally.guessed += self.guesses
        draft.tally.passes += bool(writers)

    # ------------------------------------------------------------------------- the device

    def warm_up(self, step: Any) -> None:
        """Run a step with all rows at rest, or as much of it as can be."""
        at, length = self.rows.at.clone(), self.rows.length.clone()
        self.rows.at.fill_(self.slots.nowhere)
        self.rows.length.zero_()
        try:
            step()
        finally:
            self.rows.at.copy_(at)
            self.rows.length.copy_(length)

    # ------------------------------------------------------------------------- when numbers go wrong

    def not_finite(self, request: Request, slot: int) -> GenerationError:
        """Read a request again, layer by layer, to say where its numbers stop being finite."""
        what = f"prompt {request.row.prompt}: the logits of new token {len(request.row.ids) + 1} are not finite"
        advice = "the weights are damaged there, or too large for this dtype (try bfloat16 or float32)"
        where = self.first_not_finite(request, slot)
        if where is None:
            return GenerationError(
                f"{what}, though reading the same tokens again gave finite numbers: check the device"
            )
        return GenerationError(f"{what}: the first that are not come out of {where}; {advice}")

    def first_not_finite(self, request: Request, slot: int) -> str | None:
        """The first sublayer whose stream is not finite on what a request has read; None if there is none."""
        self.slots.clear(slice(slot, slot + 1))
        for start, end in ((0, len(request.prompt)), (len(request.prompt), len(request.text))):
            if start == end:
                continue
            for name, x in self.composed.steps(*self.excerpt(request, slot, start, end)):
                if not bool(x.isfinite().all()):
                    return name
            if not bool(self.composed.logits(x).isfinite().all()):
                return "the final norm or the head"
        return None


def with_step(layout: Layout, spec: Spec) -> Layout:
    """A layout of one row that knows how its positions go on. Raises LayoutError where the engine knows no rule."""
    if layout.explicit:
        raise LayoutError("the engine knows the visibility of glm/layout.py only: use the model itself, `glm.generate`")
    if layout.step is None:
        layout.step = torch.tensor([spec.reading.step])
    return layout


def by_rule(layout: Layout, length: int) -> Layout:
    """A layout of one row as its rule, on the CPU. Raises LayoutError where it has none that the engine knows."""
    visible = layout.visible.cpu()
    ruled = Layout.rule(layout.positions.cpu(), prefix=visible[:, 0].sum(-1))
    if visible.shape != (1, length, length) or not torch.equal(ruled.visible, visible):
        raise LayoutError(
            f"the engine reads one text of {length} tokens, all of which see the past, and all of the first few; "
            f"give the model itself a layout such as this one of {list(visible.shape)}"
        )
    return ruled
