"""Blank infilling: the objective GLM is named for, and how a trained model fills the blanks of a text.

A text loses some spans, each replaced by one mask token. The model reads what is left and writes the spans, one
after another in a random order, each started by <sop> and ended by <eop> (Du et al. 2022, arXiv:2103.10360, 2.1):

    text      x1 x2 [x3] x4 [x5 x6]            the second blank written first:

    ids       x1 x2 [M] x4 [M]   <sop> x5 x6     <sop> x3
    targets   -  -  -   -  -     x5    x6 <eop>  x3    <eop>
    place     0  1  2   3  4     4     4  4      2     2        first position axis: where in the text
    inside    0  0  0   0  0     1     2  3      1     2        second position axis: where in the span

What is read sees all of itself; what is written sees that, and what was written before. Everything else is a
choice of spans: short ones of Poisson lengths, whole sentences, one long one to the end (the three of the paper);
cuts as a person would make them; and the answer to a question, which is a long blank at the end of the prompt.

Where a text may be cut. Between words, Chinese characters and signs (`units`), so that blanks look like those a
person types. White space beside a blank belongs to neither side: ChatGLM-6B's tokenizer drops it, "a [MASK] b" and
"a[MASK]b" are the same ids, the pieces between the masks are encoded one by one, and what is written starts and
ends without white space. `join` finds out afterwards whether a space belongs there.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm.errors import GLMError, PromptError
from glm.generation import generate
from glm.layout import Blank, InTurn, Layout
from glm.model import GLM
from glm.norms import wide
from glm.spec import Spec
from glm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glm.runtime import Engine

Ids = list[int]
Span = tuple[int, int]  # first unit, one past the last
Encode = Callable[[str], Ids]

IGNORED = -100  # the target of a token that nothing is learnt from
MASK = "[MASK]"


@dataclass(frozen=True)
class Marks:
    """The ids the objective is written with; releases differ in them, so they are data."""

    mask: int  # a blank within a text
    gmask: int  # a blank at its end, of any length
    sop: int  # starts what is written
    eop: int  # ends it

    @classmethod
    def of(cls, spec: Spec) -> "Marks":
        """Those of a model that fills blanks. Raises GLMError for one that reads from left to right."""
        if not isinstance(spec.reading, Blank) or len(spec.reading.masks) != 2 or len(spec.stop) != 1:
            raise GLMError("this model fills no blanks of exactly two kinds, as tiny-glm does")
        gmask, mask = spec.reading.masks
        return cls(mask=mask, gmask=gmask, sop=spec.reading.sop, eop=spec.stop[0])


# -- one row to learn from ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A text with blanks, `read`, and what is `written`: for each blank its place in `read` and its ids."""

    read: Ids
    written: Sequence[tuple[int, Ids]]
    marks: Marks

    def __len__(self) -> int:
        """T tokens: those read, and each span with its <sop>."""
        return len(self.read) + sum(len(span) + 1 for _, span in self.written)

    @property
    def ids(self) -> Ids:
        """What the model is given, [T]."""
        return self.read + [id for _, span in self.written for id in (self.marks.sop, *span)]

    @property
    def targets(self) -> Ids:
        """What it should say after each of them, [T]; IGNORED where it only reads."""
        return [IGNORED] * len(self.read) + [id for _, span in self.written for id in (*span, self.marks.eop)]

    @property
    def layout(self) -> Layout:
        """Both position axes, and who sees whom: one row, [1, T, 2]."""
        return Layout.blanks(len(self.read), [(place, len(span) + 1) for place, span in self.written])


def loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of targets [B, T] under logits [B, T, V], those that are IGNORED left out.

    Unshifted: `Sample.targets`, as the labels of the official code, already are what comes after each token.
    """
    return F.cross_entropy(wide(logits).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def batch(samples: Sequence[Sample], pad: int) -> tuple[Tensor, Tensor, Layout]:
    """Samples as ids [B, T], targets [B, T] and their layout, with `pad` on the right of the shorter ones.

    Nobody sees that padding: it is not among what was read, and comes after all that was written.
    """
    B, T = len(samples), max(map(len, samples))
    ids, targets = torch.full((B, T), pad), torch.full((B, T), IGNORED)
    positions = torch.zeros(B, T, 2, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample)] = torch.tensor(sample.ids)
        targets[row, : len(sample)] = torch.tensor(sample.targets)
        positions[row, : len(sample)] = sample.layout.positions[0]
    return ids, targets, Layout.rule(positions, prefix=torch.tensor([len(sample.read) for sample in samples]))


def blanked(pieces: Sequence[str], spans: Sequence[Span], encode: Encode, marks: Marks, rng: Random) -> Sample:
    """A text in units, without `spans` (in order, apart from each other), which are to be written in any order."""
    read: Ids = []
    written: list[tuple[int, Ids]] = []
    end = 0
    for start, stop in spans:
        read += encode("".join(pieces[end:start]).strip())
        written.append((len(read), encode("".join(pieces[start:stop]).strip())))
        read.append(marks.mask)
        end = stop
    read += encode("".join(pieces[end:]).strip())
    rng.shuffle(written)
    return Sample(read, written, marks)


def continued(pieces: Sequence[str], start: int, encode: Encode, marks: Marks) -> Sample:
    """The plain objective: all from unit `start` on is one blank, [gMASK], at the end of what comes before it."""
    read = encode("".join(pieces[:start]).strip())
    return Sample([*read, marks.gmask], [(len(read), encode("".join(pieces[start:]).strip()))], marks)


def answered(prompt: Ids, answer: Ids, marks: Marks) -> Sample:
    """The chat objective: `answer` fills the [gMASK] of a `prompt` (given without its <sop>)."""
    return Sample(prompt, [(prompt.index(marks.gmask), answer)], marks)


# -- where a text may be cut -------------------------------------------------------------------------------------------

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
UNIT = re.compile(rf"\s+|(?:[{CJK}]|[^\W{CJK}]+|[^\w\s])\s*")
SENTENCE_ENDS = ".!?。！？"
CLAUSE_ENDS = SENTENCE_ENDS + ",;:，；：、"


def units(text: str) -> list[str]:
    """What a text may be cut between: words, Chinese characters, signs; each with the white space after it."""
    return UNIT.findall(text)


def runs(pieces: Sequence[str], ends: str) -> list[Span]:
    """Sentences or clauses: runs of units up to and with a sign of `ends` (an ASCII one only before a space)."""
    closing = [
        i
        for i, piece in enumerate(pieces, 1)
        if i == len(pieces) or (piece.strip() in ends and not (piece.isascii() and piece == piece.strip()))
    ]
    return list(zip([0, *closing], closing, strict=False))


# -- the spans of the paper --------------------------------------------------------------------------------------------


def poisson(mean: float, rng: Random) -> int:
    """A Poisson number: how many uniform numbers can be multiplied before the product falls below e^-mean (Knuth)."""
    count, product = 0, rng.random()
    while product > math.exp(-mean):
        count, product = count + 1, product * rng.random()
    return count


def apart(span: Span, others: Sequence[Span]) -> bool:
    """Whether at least one unit stands between `span` and each of the `others`."""
    return all(span[1] < start or end < span[0] for start, end in others)


def short_spans(length: int, rng: Random, share: float = 0.15, mean: float = 3.0) -> list[Span]:
    """Spans of Poisson lengths until `share` of `length` ≥ 2 units is cut, all apart; at least one, in order."""
    left = max(1, round(share * length))
    spans: list[Span] = []
    for _ in range(10 * length):  # a crowded text may have no room for the last of them
        size = min(max(1, poisson(mean, rng)), left)
        start = rng.randint(0, length - size)
        if apart((start, start + size), spans):
            spans.append((start, start + size))
            left -= size
        if left == 0:
            break
    return sorted(spans)


def sentence_spans(pieces: Sequence[str], rng: Random, share: float = 0.15) -> list[Span]:
    """Whole sentences, all apart, until `share` of the text is cut, in order; short spans of a lone sentence."""
    spans: list[Span] = []
    sentences = runs(pieces, SENTENCE_ENDS)
    for span in rng.sample(sentences, len(sentences)):
        if sum(end - start for start, end in spans) >= share * len(pieces):
            break
        if apart(span, spans) and span != (0, len(pieces)):
            spans.append(span)
    return sorted(spans) or short_spans(len(pieces), rng)


def long_start(length: int, rng: Random) -> int:
    """Where the one long span begins that goes to the end: it is half to all of the text."""
    return rng.randint(0, length // 2)


# -- the spans of a person ---------------------------------------------------------------------------------------------


def cut(pieces: Sequence[str], rng: Random) -> Span:
    """One span as a person might blank it: a word or a few, clauses, sentences, any stretch, a beginning, an end."""
    n = len(pieces)
    kind = rng.choice(("words", "words", "clauses", "sentences", "stretch", "edge"))
    if kind in ("clauses", "sentences"):
        found = runs(pieces, CLAUSE_ENDS if kind == "clauses" else SENTENCE_ENDS)
        first = rng.randrange(len(found))
        start, end = found[first][0], found[min(first + rng.choice((0, 0, 0, 1)), len(found) - 1)][1]
        return start, end - int(end - start > 1 and rng.random() < 0.5)  # with the sign that closes it, or without
    if kind == "words":
        size = 1 + poisson(rng.choice((0.5, 3.0, 10.0)), rng)
    else:
        size = rng.choice((round(n ** rng.random()), rng.randint(1, 1 + n // 2)))  # of every order, or of every length
    size = min(size, n)
    start = rng.choice((0, n - size)) if kind == "edge" else rng.randint(0, n - size)
    return start, start + size


def cuts(pieces: Sequence[str], rng: Random) -> list[Span]:
    """One to eight cuts, all apart, in order, that leave a third of the text or more."""
    wanted = rng.choice((1, 1, 2, 3, 5, 8))
    spans: list[Span] = []
    for _ in range(20 * wanted):
        span = cut(pieces, rng)
        if apart(span, spans) and 3 * sum(end - start for start, end in [*spans, span]) <= 2 * len(pieces):
            spans.append(span)
        if len(spans) == wanted:
            break
    return sorted(spans) or short_spans(len(pieces), rng)


# -- filling blanks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Filled:
    """A text whose blanks were filled, and what was written into each."""

    text: str
    blanks: list[str]


def fill(
    model: "GLM | Engine", tokenizer: Tokenizer, text: str, *, max_new_tokens: int = 256, **sampling: Any
) -> Filled:
    """Fills every [MASK] of `text`, from left to right; each is written knowing what the earlier ones became.

    Models that know `[sMASK]` and `[gMASK]` as well have their own ways (`in_turn`, `one_by_one`).
    `sampling` is what `glm.generate` takes besides: temperature, top_p, seed and so on; the default is greedy.

    Raises PromptError for a text without a [MASK], GLMError for a model or tokenizer that fills none.
    """
    if not isinstance(model.spec.reading, Blank):
        raise GLMError("this model fills no blanks: take one that reads both ways, such as tiny-glm")
    if MASK not in text and (tokenizer is None or not any(kind in text for kind in tokenizer.format.blanks)):
        raise PromptError(f"there is no {MASK} in the text: write it where something is missing")
    if len(tokenizer.format.blanks) > 1:
        way = in_turn if isinstance(model.spec.reading, InTurn) else one_by_one
        return way(model, tokenizer, text, max_new_tokens=max_new_tokens, **sampling)
    marks = Marks.of(model.spec)
    before, *rest = text.split(MASK)
    blanks: list[str] = []
    while rest:
        prompt = asked([before, *rest], plain(tokenizer), marks)
        [ids] = generate(model, [prompt], max_new_tokens=max_new_tokens, **sampling)
        blanks.append(tokenizer.decode(ids, special=False).strip())
        before = join(join(before, blanks[-1]), rest.pop(0))
    return Filled(before, blanks)


def in_turn(model: "GLM | Engine", tokenizer: Tokenizer, text: str, **how: Any) -> Filled:
    """All blanks of one row: behind the text one span after another, each started by <sop>, as in training."""
    prompt = tokenizer.infill(text)
    before, *rest = cut_at(text, tokenizer.format.blanks)
    blanks: list[str] = []
    for after in rest[1::2]:
        [ids] = generate(model, [prompt], **how)
        prompt += [*ids, prompt[-1]]
        blanks.append(tokenizer.decode(ids, special=False).strip())
        before = join(join(before, blanks[-1]), after)
    return Filled(before, blanks)


def one_by_one(model: "GLM | Engine", tokenizer: Tokenizer, text: str, **how: Any) -> Filled:
    """One blank a row: what was written takes the blank's place before the next is asked for.

    First the blanks of the kind that the model fills first, from left to right. (`blanks` are in the order of writing.)
    """
    blanks, reading = list[str](), model.spec.reading
    assert isinstance(reading, Blank)
    kinds = sorted(tokenizer.format.blanks, key=lambda kind: reading.masks.index(tokenizer.id(kind)))
    while kind := next((kind for kind in kinds if kind in text), None):
        [ids] = generate(model, [tokenizer.infill(text)], **how)
        blanks.append(tokenizer.decode(ids, special=False).strip())
        before, _, after = text.partition(kind)
        text = join(join(before, blanks[-1]), after)
    return Filled(text, blanks)


def cut_at(text: str, names: Sequence[str]) -> list[str]:
    """`text` cut at every one of `names`: text, name, text, name … text."""
    return re.split("(" + "|".join(map(re.escape, names)) + ")", text)


def asked(pieces: Sequence[str], encode: Encode, marks: Marks) -> Ids:
    """The prompt that asks for the first of the blanks between `pieces`, ending in <sop>."""
    first, *others = [encode(piece.strip()) for piece in pieces]
    return [*first, *(id for piece in others for id in (marks.mask, *piece)), marks.sop]


def plain(tokenizer: Tokenizer) -> Encode:
    """Its `encode`, for which text is only text."""
    return partial(tokenizer.encode, parse=False)


WORD_THEN_WORD = re.compile(rf"[^\W{CJK}]\Z|[.,;:!?]\Z"), re.compile(rf"[^\W{CJK}]")
NO_SPACE = re.compile(r"[.,;:!?%)\]}]")
WIDE = re.compile(rf"[{CJK}\u3000-\u303f\uff00-\uffef—…“”‘’]")


def join(left: str, right: str) -> str:
    """Two sides of the edge of a blank, with the white space typed there, or the space that belongs there.

    Typed white space stays, except beside Chinese characters and before a closing sign. Where none was typed, one
    space parts two words.
    """
    a, b = left.rstrip(), right.lstrip()
    typed = left[len(a) :] + right[: len(right) - len(b)]
    if not a or not b:
        return left + right
    if "\n" in typed:
        return a + typed + b
    if typed:
        wide = WIDE.match(a[-1]) and WIDE.match(b[0])
        return a + b if wide or NO_SPACE.match(b[0]) else a + typed + b
    return a + " " + b if WORD_THEN_WORD[0].search(a) and WORD_THEN_WORD[1].match(b) else a + b
