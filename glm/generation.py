"""Generation: from logits to tokens, one after another.

    next ~ softmax(logits / temperature), over the top_k likeliest and of those the fewest with mass ≥ top_p

`generate` continues many prompts at once, `stream` one, token by token. Prompts of different length are padded on
the left and share one cache, made for exactly as many tokens as can come. What a row says depends on its prompt and
the seed, not on its neighbours: padding is never seen, and every row throws its own dice. (Up to rounding, that is:
a matrix product over more rows may round differently, which in half precision can tip a close decision.)

The official chat functions sample: ChatGLM-6B at temperature 0.95 with top_p 0.7, ChatGLM2 and 3 at 0.8 with 0.8.
"""

import operator
import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from glm.cache import Cache
from glm.drafting import Drafter
from glm.errors import GenerationError
from glm.fields import shown
from glm.layout import Blank, Layout
from glm.model import GLM
from glm.norms import wide
from glm.spec import Spec

if TYPE_CHECKING:
    from glm.runtime import Engine

Decode = Callable[[list[int]], str]


def generate(
    model: "GLM | Engine",
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
    chunk: int | None = None,
    draft: Drafter | None = None,
) -> list[list[int]]:
    """Continue each of `prompts` (lists of ids, of any lengths); returns the new ids of each.

    An engine does it in its own way (`glm.Engine.generate`): `chunk` and `draft` it was given when it was made.

    max_new_tokens      at most so many new ids a row; memory is taken for all of them at the start.
    temperature         0 (the default) is greedy: always the likeliest token; top_k, top_p and seed do nothing then.
    top_k               sample among the k likeliest; 0 is all. Ties with the k-th stay in.
    top_p               sample among the fewest tokens whose probabilities, after top_k, reach this sum; 1 is all.
    repetition_penalty  logits of ids that stand in the prompt or were generated are divided by it where
                        positive, multiplied where negative (CTRL, Keskar et al. 2019, arXiv:1909.05858); 1 is none.
    seed                same seed, same prompt, same tokens, whoever the neighbours. Equal prompts in one call get
                        different samples, the first of them the one it would get alone. None draws a seed from
                        torch's global generator.
    stop                ids that end a row; None is `model.spec.stop`, () is none.
    stop_text           strings that end a row, wherever tokens cut them; needs `decode`, such as tokenizer.decode.
    keep_stop           by default a row ends with the last id before the stop: the stop id is left out, and so is
                        every token that holds part of a stop string. True keeps them.
    chunk               read prompts in pieces of so many tokens, to save memory; for causal models only.
    draft               guesses several tokens ahead, which the model then reads in one pass; the ids are the same, they
                        come in fewer passes. See `glm.drafting`; `draft.tally` counts how many guesses were right.

    Raises GenerationError for arguments out of range, ids outside the vocabulary and logits that are not finite;
    LayoutError for a blank-filling prompt without a blank.
    """
    if not isinstance(model, GLM):
        unasked(chunk, draft)
        return model.generate(
            prompts, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            repetition_penalty=repetition_penalty, stop=stop, stop_text=stop_text, decode=decode, keep_stop=keep_stop,
        )  # fmt: skip
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
    ending = Ending.of(model.spec.stop if stop is None else stop, stop_text, decode, keep_stop)
    rows = checked(model.spec, prompts, max_new_tokens, chunk)
    new: list[list[int]] = [[] for _ in rows]
    for row, token in continuations(model, rows, max_new_tokens, sampler, seed, ending, chunk, draft):
        new[row].append(token)
    return new


def stream(
    model: "GLM | Engine",
    prompt: Sequence[int],
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
    chunk: int | None = None,
    draft: Drafter | None = None,
) -> Generator[int, None, None]:
    """The ids `generate` returns for one prompt, each as soon as it is certain; see there for the arguments.

    Tokens that may turn out to begin a stop string are held back until that is decided. Closing the generator,
    or dropping it, frees the cache. Arguments are checked by the call itself, not by the first token.
    """
    if not isinstance(model, GLM):
        unasked(chunk, draft)
        return model.stream(
            prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
            repetition_penalty=repetition_penalty, stop=stop, stop_text=stop_text, decode=decode, keep_stop=keep_stop,
        )  # fmt: skip
    sampler = Sampler(temperature, top_k, top_p, repetition_penalty)
    ending = Ending.of(model.spec.stop if stop is None else stop, stop_text, decode, keep_stop)
    rows = checked(model.spec, [prompt], max_new_tokens, chunk)
    return (token for _, token in continuations(model, rows, max_new_tokens, sampler, seed, ending, chunk, draft))


def unasked(chunk: int | None, draft: Drafter | None) -> None:
    """Raise GenerationError for what an engine is told when it is made."""
    if chunk is not None or draft is not None:
        raise GenerationError("an engine has its chunk and its draft from the beginning: glm.Engine(model, draft=…)")


@torch.inference_mode()
def continuations(
    model: GLM,
    prompts: list[list[int]],
    max_new_tokens: int,
    sampler: "Sampler",
    seed: int | None,
    ending: "Ending",
    chunk: int | None,
    draft: Drafter | None,
) -> Generator[tuple[int, int], None, None]:
    """Pairs (row, id), each as soon as it is certain that the row holds it. Rows that are done are ignored."""
    if not prompts or max_new_tokens == 0:
        return
    ids, real = padded_left(prompts, model.device)  # [B T]
    cache = model.new_cache(len(ids), ids.shape[1] + max_new_tokens - 1)  # the last token is never read
    layout, guess = model.layout(ids, real), None
    if draft is not None:
        guess = draft.start(model, ids, real, ids.shape[1] + max_new_tokens)
    logits, stream = read(model, ids, layout, cache, chunk, guess is not None)  # [B 1 V], [B T D]
    known, guesses = ids[:, 1:], ids[:, :0]  # to tell the drafter; what it guessed
    seen = torch.zeros_like(logits[:, 0], dtype=torch.bool).scatter_(1, ids, True)
    dice = thrown(prompts, seed) if sampler.temperature else []
    rows = [Row(b, ending) for b in range(len(prompts))]
    left = max_new_tokens
    while True:
        for right in range(logits.shape[1]):  # so many guesses are right in every row
            luck = torch.tensor([die.random() for die in dice], dtype=torch.float64, device=ids.device)
            tokens, finite = sampler(logits[:, right], seen, luck)  # [B]
            chosen = torch.where(finite, tokens, -1).tolist()  # the one wait for the device
            left -= 1
            agree = right < guesses.shape[1] and agreed(rows, chosen, guesses[:, right].tolist())
            if draft is not None:
                draft.tally.right += agree
            for row, token in zip(rows, chosen, strict=True):
                yield from ((row.prompt, ready) for ready in row.take(token, last=left == 0))
            if all(row.done for row in rows):
                return
            seen.scatter_(1, tokens[:, None], True)
            if not agree:
                break
        if draft is None or guess is None:
            logits = model(tokens[:, None], cache=cache, last=True)
            continue
        layout = layout.without_last(guesses.shape[1] - right)
        cache.rewind(layout)
        certain = torch.cat((known, guesses[:, :right], tokens[:, None]), dim=1)
        known, guesses = ids[:, :0], guess(certain, stream[:, : certain.shape[1]], layout)[:, : left - 1]
        draft.tally.guessed += guesses.shape[1]
        draft.tally.passes += 1
        layout = model.spec.reading.following(layout, 1 + guesses.shape[1])
        stream, _ = model.stream(torch.cat((tokens[:, None], guesses), dim=1), layout, cache)
        logits = model.head(stream)


def agreed(rows: "list[Row]", chosen: list[int], guessed: list[int]) -> bool:
    """Whether every row that goes on has chosen what was guessed."""
    return all(row.done or a == b for row, a, b in zip(rows, chosen, guessed, strict=True))


def padded_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and real, [B, T]. Padding is never seen, so any id will do: each row repeats its first."""
    T = max(map(len, prompts))
    ids = torch.tensor([prompt[:1] * (T - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    real = torch.arange(T) >= T - lengths[:, None]
    return ids.to(device), real.to(device)


def read(
    model: GLM, ids: Tensor, layout: Layout, cache: Cache, chunk: int | None, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Fill `cache` with prompts [B, T], all at once or `chunk` tokens at a time.

    Returns the logits of the last token [B, 1, V], and where it is `wanted` the stream before the head [B, T, D].
    """
    T = ids.shape[1]
    streams = []
    for end in (*range(chunk or T, T, chunk or T), T):
        new = slice(len(cache), end)
        part = layout
        if end - new.start < T:
            part = Layout.rule(layout.positions[:, new], end, start=layout.start)
        if wanted:
            streams.append(model.stream(ids[:, new], part, cache)[0])
        else:
            logits: Tensor = model(ids[:, new], part, cache, last=True)
    if not wanted:
        return logits, logits[:, :0]
    return model.head(streams[-1][:, -1:]), torch.cat(streams, dim=1)


def thrown(prompts: list[list[int]], seed: int | None) -> list[random.Random]:
    """A die for each row, made from the seed, the prompt, and how often that prompt came before."""
    if seed is None:
        seed = int(torch.randint(1 << 62, ()))
    before: Counter[tuple[int, ...]] = Counter()
    dice = []
    for prompt in prompts:
        dice.append(random.Random(f"{seed} {before[tuple(prompt)]} {prompt}"))
        before[tuple(prompt)] += 1
    return dice


@dataclass(frozen=True)
class Sampler:
    """The equation at the top of this file; its fields are the arguments of `generate`."""

    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float

    def __post_init__(self) -> None:
        """Raise GenerationError for a field out of range."""
        if not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise GenerationError(f"temperature is 0 (greedy) or from 1e-6 to 1e6, not {self.temperature}")
        if self.top_k < 0:
            raise GenerationError(f"top_k is at least 1, or 0 for all tokens, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is over 0 and at most 1, not {self.top_p}; greedy is temperature=0")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise GenerationError(f"repetition_penalty is from 0.01 to 100, not {self.repetition_penalty}")

    def __call__(self, logits: Tensor, seen: Tensor, luck: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and seen [B, V], luck [B] -> the next ids [B], and whether the logits of the row were finite."""
        x = penalise(wide(logits), seen, self.repetition_penalty)
        finite = x.isfinite().all(-1)
        if self.temperature == 0:
            return x.argmax(-1), finite
        x = (x - x.amax(-1, keepdim=True)) / self.temperature  # in this order a low temperature loses nothing
        return sample(top_p(top_k(x, self.top_k), self.top_p), luck), finite


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make the tokens `seen` (bool) less likely if penalty > 1: [B, V] -> [B, V]."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k likeliest and what ties with the last of them; k = 0 is all. [B, V] -> [B, V]."""
    if not 0 < k < logits.shape[-1]:
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)


def top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest tokens, likeliest first, with probabilities of sum ≥ p: [B, V] -> [B, V].

    Nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751). At least one token stays.
    """
    if p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    reached = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
    likelier = F.pad(reached[..., :-1], (1, 0))  # the mass of all before it
    return logits.scatter(-1, order, ordered.masked_fill(likelier >= p, -torch.inf))


def sample(logits: Tensor, luck: Tensor) -> Tensor:
    """Ids [B] from softmax(logits [B, V]): the first whose cumulative probability exceeds `luck` [B] in [0, 1)."""
    p = logits.softmax(-1)
    reached = p.cumsum(-1, dtype=torch.float64).masked_fill(p == 0, 0)  # impossible, however the sum rounds
    return (reached > luck[:, None] * reached.amax(-1, keepdim=True)).int().argmax(-1)


@dataclass(frozen=True)
class Ending:
    """What ends a row, and whether it keeps it."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    decode: Decode
    keep: bool

    @classmethod
    def of(cls, stop: int | Iterable[int], text: str | Iterable[str], decode: Decode | None, keep: bool) -> "Ending":
        """From the arguments of `generate`. Raises GenerationError."""
        try:
            ids = frozenset(map(operator.index, stop if isinstance(stop, Iterable) else (stop,)))
        except TypeError:
            raise GenerationError(f"stop takes ids, not {stop!r}; strings go into stop_text") from None
        strings = (text,) if isinstance(text, str) else tuple(text)
        if not all(isinstance(string, str) and string for string in strings):
            raise GenerationError(f"stop_text takes strings of at least one character, not {text!r}")
        if strings and decode is None:
            raise GenerationError("stop_text needs a way to read ids: give decode=tokenizer.decode")
        return cls(ids, strings, decode or str, keep)  # nothing is decoded when there are no strings

    def before(self, ids: list[int], settled: int) -> tuple[int, bool]:
        """How many of a row's new `ids` are certain to come before a stop string, and whether one is there.

        The first `settled` were certain before the newest id came, so only the ids since then need decoding, with
        some before them for context: one for each byte of a stop string, and 32 because some have no text.
        """
        if not self.strings:
            return len(ids), False
        first = max(0, settled - 32 - max(len(string.encode()) for string in self.strings))
        ids = ids[first:]
        text = self.decode(ids)
        found = [text.index(string) for string in self.strings if string in text]
        text = text[: min(found) if found else self.may_begin(text)]
        count = len(ids)
        while count and not text.startswith(self.decode(ids[:count])):
            count -= 1
        return first + count, bool(found)

    def may_begin(self, text: str) -> int:
        """Where in `text` the first part of a stop string stands at its end; an unfinished character may be one."""
        text = text.rstrip("\ufffd")
        longest = max(map(len, self.strings))
        starts = range(max(0, len(text) - longest), len(text) + 1)
        return next(i for i in starts if any(string.startswith(text[i:]) for string in self.strings))


class Row:
    """The new ids of one prompt, and how many of them have been handed out."""

    def __init__(self, prompt: int, ending: Ending) -> None:
        self.prompt = prompt
        self.ending = ending
        self.ids: list[int] = []
        self.given = 0
        self.done = False

    def take(self, token: int, last: bool) -> list[int]:
        """Append `token` (negative: its logits were not finite), the `last` one or not; return what is now certain."""
        if self.done:
            return []
        if token < 0:
            raise GenerationError(
                f"prompt {self.prompt}: the logits of new token {len(self.ids) + 1} are not finite: "
                "the weights are damaged, or too large for this dtype (try bfloat16 or float32)"
            )
        self.ids.append(token)
        if token in self.ending.ids:
            certain, self.done = len(self.ids) - 1, True
        else:
            certain, self.done = self.ending.before(self.ids, self.given)
            if last and not self.done:
                certain, self.done = len(self.ids), True
        if self.ending.keep:
            certain = len(self.ids)
        ready = self.ids[self.given : certain]
        self.given += len(ready)
        return ready


def checked(spec: Spec, prompts: Sequence[Sequence[int]], max_new_tokens: int, chunk: int | None) -> list[list[int]]:
    """The prompts as lists of ints. Raises GenerationError where they or the lengths cannot be used."""
    reading = spec.reading
    if not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise GenerationError(f"max_new_tokens is a whole number from 0, not {max_new_tokens}")
    if chunk is not None and (not isinstance(chunk, int) or chunk < 1):
        raise GenerationError(f"chunk is a whole number from 1, or None, not {chunk}")
    if chunk is not None and isinstance(reading, Blank):
        raise GenerationError("this model reads a prompt in both directions, so in one piece: leave chunk out")
    rows = []
    for i, prompt in enumerate(prompts):
        try:
            ids = [operator.index(id) for id in prompt]
        except TypeError:
            raise GenerationError(
                f"prompt {i} should be a list of ids, not {shown(prompt)}: encode text first, "
                "give generate a list of prompts and stream a single one"
            ) from None
        if not ids:
            raise GenerationError(f"prompt {i} is empty: give at least one id")
        if strange := [id for id in ids if not 0 <= id < spec.vocabulary]:
            raise GenerationError(
                f"prompt {i} holds the id {strange[0]}, but the model's are 0 … {spec.vocabulary - 1}: "
                "is this the model's own tokenizer?"
            )
        if isinstance(reading, Blank) and reading.sop not in ids:
            raise GenerationError(
                f"prompt {i} lacks the start token {reading.sop}, after which this model writes: "
                "tokenizer.encode(text, special=True) puts it there"
            )
        rows.append(ids)
    return rows
