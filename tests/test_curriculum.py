"""Texts to batches: what is found in them, every item in turn, any place to enter at."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import tokenizers

from glm.curriculum import Batches, Chat, Passages, excerpt, pairs, passages
from glm.family.text_chatglm import CHATGLM_BYTES
from glm.infilling import SENTENCE_ENDS, Marks, Sample, runs, units
from glm.recipe import Objective
from glm.tokenizer import Tokenizer
from glm.training import learnt_vocabulary
from glm.vocabulary import ByteLevel

GLOSSARY = """# Glossary

Q: What is GLM?
A: A language model.

问：什么是掩码？
答：一个空白。

Q: A question without an answer?

Q:   Spaces?\x20
A:  None.
"""
PROSE = """# Title

One sentence here. Another sentence there,
over two lines.

  第一句在这里。第二句在那里。第三句。
"""
CHAT = Objective(kind="chat", text="", share=1, history=0, careless=0, excerpt=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    bpe: tokenizers.Tokenizer = learnt_vocabulary([GLOSSARY, PROSE], 400)
    return Tokenizer(ByteLevel(bpe.to_str().encode()), CHATGLM_BYTES)


@pytest.fixture(scope="module")
def marks(tokenizer: Tokenizer) -> Marks:
    return Marks(*(tokenizer.id(name) for name in ("[MASK]", "[gMASK]", "<sop>", "<eop>")))


def test_texts() -> None:
    assert pairs(GLOSSARY) == [
        ("What is GLM?", "A language model."),
        ("什么是掩码？", "一个空白。"),
        ("Spaces?", "None."),
    ]
    assert passages(PROSE) == [
        "One sentence here. Another sentence there,\nover two lines.",
        "第一句在这里。第二句在那里。第三句。",
    ]
    assert pairs(PROSE) == []


def test_a_question_is_asked_as_the_release_asks_it(tokenizer: Tokenizer, marks: Marks) -> None:
    sample = Chat(GLOSSARY, CHAT, tokenizer, marks).sample(1, random.Random(0))
    assert sample.read == [*tokenizer.encode("什么是掩码？", parse=False), marks.gmask]
    assert sample.written == [(len(sample.read) - 1, tokenizer.encode("一个空白。", parse=False))]


def test_earlier_rounds_and_careless_typing(tokenizer: Tokenizer, marks: Marks) -> None:
    chat = Chat(GLOSSARY, replace(CHAT, history=0.5, careless=0.5), tokenizer, marks)
    rng = random.Random(1)
    asked = {tokenizer.decode(chat.sample(0, rng).read[:-1]) for _ in range(300)}
    assert {"What is GLM?", "What is GLM", "what is glm?"} <= asked
    rounds = "[Round 0]\n问：什么是掩码？\n答：一个空白。\n[Round 1]\n问：What is GLM?\n答："
    assert rounds in asked
    assert any("[Round 2]" in text for text in asked)
    assert not any("[Round 3]" in text for text in asked)


@pytest.mark.parametrize("kind", ["cuts", "short", "sentences", "long", "continue"])
def test_passages_lose_nothing_but_their_blanks(kind: str, tokenizer: Tokenizer, marks: Marks) -> None:
    source = Passages(PROSE, replace(CHAT, kind=kind), tokenizer, marks)
    rng = random.Random(2)
    for turn in range(100):
        sample = source.sample(turn % 2, rng)
        assert sample.written
        spans = dict(sample.written)
        pieces = [
            tokenizer.decode(spans[i]) if i in spans else tokenizer.decode([id]) for i, id in enumerate(sample.read)
        ]
        assert "".join("".join(pieces).split()) == "".join(passages(PROSE)[turn % 2].split())
        assert {sample.read[place] for place in spans} == {marks.gmask if kind in ("long", "continue") else marks.mask}


def test_an_excerpt_is_whole_sentences_and_is_not_cut_at_its_edges(tokenizer: Tokenizer, marks: Marks) -> None:
    pieces, rng = units(passages(PROSE)[1]), random.Random(3)
    starts, ends = zip(*runs(pieces, SENTENCE_ENDS), strict=True)
    seen = {excerpt(pieces, rng) for _ in range(200)}
    assert seen == {(start, end) for start in starts for end in ends if start < end}
    source = Passages(PROSE, replace(CHAT, kind="cuts", excerpt=1.0), tokenizer, marks)
    for _ in range(300):
        shown, spans = source.chosen(pieces, rng)
        assert spans
        if shown[0] != pieces[0]:
            assert spans[0][0] > 0
        if shown[-2:] != pieces[-2:]:
            assert spans[-1][1] < len(shown)


class Counting:
    """A source whose samples tell which item they are of, and how they were drawn."""

    def __init__(self, name: int, items: int) -> None:
        self.name, self.items = name, items

    def __len__(self) -> int:
        return self.items

    def sample(self, item: int, rng: random.Random) -> Sample:
        return Sample([self.name, item] * rng.randint(1, 8), [(0, [0])], Marks(1, 2, 3, 4))


def test_every_item_in_turn_and_every_source_in_proportion() -> None:
    batches = Batches([Counting(0, 7), Counting(1, 100)], [3, 1], tokens=64, seed=0)
    samples = [sample for _ in range(300) for sample in next(batches)]
    counts = Counter(tuple(sample.read[:2]) for sample in samples)
    sources = Counter(sample.read[0] for sample in samples)
    assert sources[0] / sources[1] == pytest.approx(3, rel=0.1)
    assert len(counts) == 107
    whole = [sample for pool in range(4) for rows in batches.draw(pool) for sample in rows]
    turns = Counter(sample.read[1] for sample in whole if sample.read[0] == 0)
    assert max(turns.values()) - min(turns.values()) <= 1


def test_batches_are_full_and_fit() -> None:
    batches = Batches([Counting(0, 7)], [1], tokens=64, seed=0)
    drawn = [next(batches) for _ in range(200)]
    sizes = [max(map(len, rows)) * len(rows) for rows in drawn]
    assert max(sizes) <= 64
    assert sum(sizes) / len(sizes) > 48
    long = Batches([Counting(0, 7)], [1], tokens=4, seed=0)
    assert all(len(next(long)) == 1 for _ in range(20))


def test_a_curriculum_can_be_entered_anywhere() -> None:
    def fresh(seed: int = 5) -> Batches:
        return Batches([Counting(0, 7), Counting(1, 30)], [1, 1], tokens=64, seed=seed)

    straight = fresh()
    for _ in range(150):
        next(straight)
    entered = fresh()
    entered.place = straight.place
    ahead = [next(straight) for _ in range(150)]
    assert [next(entered) for _ in range(150)] == ahead
    assert list(islice((next(fresh(6)) for _ in range(5)), 5)) != ahead[:5]
