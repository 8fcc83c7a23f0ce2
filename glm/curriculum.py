"""What is learnt from which text, in which order: from the objectives of a recipe to batches.

A glossary holds questions and answers, `Q: …` and below it `A: …` (or `问：…` and `答：…`); passages are paragraphs,
parted by empty lines. An objective makes a new sample of an item each time it comes up: other blanks, other earlier
rounds. Everything random is drawn from the seed and a count, nothing from what came before, so that a curriculum
can be entered at any place.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from random import Random
from typing import Protocol

from glm.infilling import (
    SENTENCE_ENDS,
    Marks,
    Sample,
    Span,
    answered,
    blanked,
    continued,
    cuts,
    long_start,
    plain,
    runs,
    sentence_spans,
    short_spans,
    units,
)
from glm.recipe import Objective
from glm.tokenizer import Tokenizer

PAIR = re.compile(r"^(?:Q:|问：)[ \t]*(\S.*?)[ \t]*\n(?:A:|答：)[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)


def pairs(text: str) -> list[tuple[str, str]]:
    """The questions of a glossary, with their answers."""
    return PAIR.findall(text)


def passages(text: str) -> list[str]:
    """The paragraphs of a text, without its headings (#)."""
    blocks = (block.strip() for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if block and not block.startswith("#")]


class Lessons(Protocol):
    """`len` items of a text, of each of which any number of samples can be made."""

    def __len__(self) -> int:
        """How many items."""

    def sample(self, item: int, rng: Random) -> Sample:
        """One row to learn from."""


EARLIER = 2  # rounds at most that stand before a question


class Chat:
    """Answers to the questions of a glossary, some after earlier rounds, some carelessly typed."""

    def __init__(self, text: str, objective: Objective, tokenizer: Tokenizer, marks: Marks) -> None:
        self.pairs = pairs(text)
        self.history, self.careless = objective.history, objective.careless
        self.tokenizer, self.marks = tokenizer, marks

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, item: int, rng: Random) -> Sample:
        """The answer to question `item`."""
        question, answer = self.pairs[item]
        earlier = rng.choices(self.pairs, k=rng.choice(range(1, EARLIER + 1))) if rng.random() < self.history else []
        if rng.random() < self.careless:
            question = rng.choice((question.rstrip("?？") or question, question.lower()))
        return self.rounds([*earlier, (question, answer)])

    def rounds(self, rounds: Sequence[tuple[str, str]]) -> Sample:
        """The answer to the last of several questions, prompted for as the release does it."""
        *earlier, (question, answer) = rounds
        messages = [{"role": "user", "content": question}]
        for asked, said in reversed(earlier):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}, *messages]
        *prompt, sop = self.tokenizer.chat(messages)
        assert sop == self.marks.sop
        return answered(prompt, plain(self.tokenizer)(answer), self.marks)


class Passages:
    """Passages with blanks, chosen as the kind of the objective says."""

    def __init__(self, text: str, objective: Objective, tokenizer: Tokenizer, marks: Marks) -> None:
        self.passages = [units(passage) for passage in passages(text)]
        self.kind, self.excerpt = objective.kind, objective.excerpt
        self.encode, self.marks = plain(tokenizer), marks

    def __len__(self) -> int:
        return len(self.passages)

    def sample(self, item: int, rng: Random) -> Sample:
        """Passage `item`, with its blanks."""
        pieces: Sequence[str] = self.passages[item]
        if self.kind in ("long", "continue"):
            start = long_start(len(pieces), rng) if self.kind == "long" else rng.randrange(len(pieces))
            return continued(pieces, start, self.encode, self.marks)
        pieces, spans = self.chosen(pieces, rng)
        return blanked(pieces, spans, self.encode, self.marks, rng)

    def chosen(self, pieces: Sequence[str], rng: Random) -> tuple[Sequence[str], list[Span]]:
        """What is shown of a passage, and its blanks."""
        if self.kind == "short":
            return pieces, short_spans(len(pieces), rng)
        if self.kind == "sentences":
            return pieces, sentence_spans(pieces, rng)
        if rng.random() >= self.excerpt:
            return pieces, cuts(pieces, rng)
        while True:
            start, end = excerpt(pieces, rng)
            spans = cuts(pieces[start:end], rng)
            # a blank at an edge that is not the passage's own could be of any length
            if (start == 0 or spans[0][0] > 0) and (end == len(pieces) or spans[-1][1] < end - start):
                return pieces[start:end], spans


def excerpt(pieces: Sequence[str], rng: Random) -> Span:
    """Some sentences of a passage, in a row."""
    sentences = runs(pieces, SENTENCE_ENDS)
    first, last = sorted(rng.choices(range(len(sentences)), k=2))
    return sentences[first][0], sentences[last][1]


def lessons(text: str, objective: Objective, tokenizer: Tokenizer, marks: Marks) -> Lessons:
    """What an objective makes of its text."""
    make = Chat if objective.kind == "chat" else Passages
    return make(text, objective, tokenizer, marks)


POOL = 512  # samples that are made together and sorted by length, so that batches need little padding


class Batches:
    """Batches without end; `place` is the (pool, batch) that comes next, and may be set.

    Of every pool each source has its share. A source goes through its items again and again, each time in a new
    order, so that no item comes up twice before all have come up once.
    """

    def __init__(self, sources: Sequence[Lessons], shares: Sequence[float], tokens: int, seed: int) -> None:
        """`tokens` is the size of a batch, padding included; a longer sample is a batch of its own."""
        self.sources, self.tokens, self.seed = sources, tokens, seed
        bounds = [round(POOL * sum(shares[:i]) / sum(shares)) for i in range(len(shares) + 1)]
        self.counts = [end - start for start, end in pairwise(bounds)]
        self.place = (0, 0)
        self.drawn: tuple[int, list[list[Sample]]] = (-1, [])

    def __next__(self) -> list[Sample]:
        pool, place = self.place
        if self.drawn[0] != pool:
            self.drawn = pool, self.draw(pool)
        batches = self.drawn[1]
        self.place = (pool, place + 1) if place + 1 < len(batches) else (pool + 1, 0)
        return batches[place]

    def draw(self, pool: int) -> list[list[Sample]]:
        """The batches of one pool."""
        rng = Random(f"{self.seed} pool {pool}")
        samples = [
            source.sample(item, rng)
            for source, count in zip(self.sources, self.counts, strict=True)
            for item in self.items(len(source), pool * count, count)
        ]
        batches: list[list[Sample]] = [[]]
        for sample in sorted(samples, key=len):
            if batches[-1] and (len(batches[-1]) + 1) * len(sample) > self.tokens:
                batches.append([])
            batches[-1].append(sample)
        rng.shuffle(batches)
        return batches

    def items(self, among: int, start: int, count: int) -> list[int]:
        """The items that come up in turns `start` … `start + count - 1` of a source with `among` items."""
        first, last = start // among, (start + count - 1) // among
        order = [item for lap in range(first, last + 1) for item in self.lap(among, lap)]
        return order[start - first * among :][:count]

    def lap(self, among: int, lap: int) -> list[int]:
        """All items once, in the order of this lap."""
        items = list(range(among))
        Random(f"{self.seed} lap {lap}").shuffle(items)
        return items
