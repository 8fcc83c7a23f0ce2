"""What is right in the exercises of chapter 2."""

from collections.abc import Iterator
from random import Random

import torch

import glm
from docs.check import Case, Exercise
from glm.family.text_chatglm2 import ADDED
from glm.infilling import IGNORED, Marks, Sample, blanked
from glm.layout import Blank, InTurn

MARKS = Marks(mask=90, gmask=91, sop=92, eop=93)
TEXTS = (  # length, spans, and in which order they are written
    (9, [(2, 4)]),
    (12, [(0, 1), (3, 7), (10, 12)]),
    (16, [(1, 4), (6, 7), (9, 11), (13, 15)]),
)


def samples() -> Iterator[tuple[list[int], list[tuple[int, int]], list[int], Sample]]:
    """Texts of the ids 10, 11, 12 …, their spans, the order of writing, and the sample that `glm` makes of them."""
    for seed, (length, spans) in enumerate(TEXTS):
        pieces = [str(10 + i) + " " for i in range(length)]
        sample = blanked(pieces, spans, lambda text: list(map(int, text.split())), MARKS, Random(seed))
        places = sorted(place for place, _ in sample.written)
        order = [places.index(place) for place, _ in sample.written]
        yield list(range(10, 10 + length)), spans, order, sample


def cut_out_cases() -> Iterator[Case]:
    """Samples of one to four spans, written in any order."""
    for text, spans, order, sample in samples():
        marks = {"mask": MARKS.mask, "sop": MARKS.sop, "eop": MARKS.eop}
        arguments = {"text": text, "spans": spans, "order": order, **marks}
        assert IGNORED == -100  # which the exercise says in so many words
        yield Case(arguments, {"ids": sample.ids, "targets": sample.targets})


def infilling_layout_cases() -> Iterator[Case]:
    """Positions and masks of the same samples."""
    for _, _, order, sample in samples():
        arguments = {"ids": sample.ids, "order": order, "mask": MARKS.mask, "sop": MARKS.sop}
        yield Case(arguments, {"positions": sample.layout.positions, "visible": sample.layout.visible})
    # blanks in turn, as GLM-10B fills them
    reading = glm.release("glm-10b").spec.reading
    assert isinstance(reading, InTurn)
    mask, sop = reading.masks[0], reading.sop
    ids = [7, mask, 8, mask, 9, sop, 1, 2, 3, sop, 4]
    layout = reading.read(torch.tensor([ids]))
    arguments = {"ids": ids, "order": [0, 1], "mask": mask, "sop": sop}
    yield Case(arguments, {"positions": layout.positions, "visible": layout.visible})


def chatglm() -> Blank:
    """How ChatGLM-6B reads."""
    reading = glm.release("chatglm-6b").spec.reading
    assert isinstance(reading, Blank)
    return reading


def chatglm_layout_cases() -> Iterator[Case]:
    """A prompt; one with an answer; a blank within the text; both kinds of blanks; two blanks of a kind."""
    reading = chatglm()
    (gmask, mask), sop = reading.masks, reading.sop
    for ids in (
        [5, 6, 7, gmask, sop],
        [5, 6, 7, gmask, sop, 8, 9, 10],
        [5, mask, 6, 7, sop, 8, 9],
        [5, mask, 6, 7, gmask, sop, 8],
        [5, mask, 6, mask, 7, sop, 8, 9],
        [5, gmask, 6, gmask, sop, 8, sop, 9],
    ):
        row = torch.tensor([ids])
        layout = reading.read(row)
        arguments = {"ids": row, "gmask": gmask, "mask": mask, "sop": sop}
        yield Case(arguments, {"positions": layout.positions, "visible": layout.visible})


def next_token_cases() -> Iterator[Case]:
    """After one row, and after rows of which one is padded."""
    reading = chatglm()
    gmask, sop = reading.masks[0], reading.sop
    one = torch.tensor([[5, 6, 7, gmask, sop, 8]])
    two = torch.tensor([[5, 6, 7, gmask, sop, 8], [3, 3, 5, gmask, sop, 8]])
    for ids, real in ((one, None), (two, two != 3)):
        layout = reading.read(ids, real)
        following = reading.following(layout, 1)
        arguments = {"positions": layout.positions, "visible": layout.visible}
        yield Case(arguments, {"positions": following.positions, "visible": following.visible})


def chatglm2_layout_cases() -> Iterator[Case]:
    """A prompt, and one with an answer."""
    gmask, sop = ADDED["[gMASK]"], ADDED["sop"]
    reading = glm.release("chatglm2-6b").spec.reading
    for text, answer in (([36474, 54591], list[int]()), ([36474, 54591, 31123], [36474, 13])):
        ids = torch.tensor([[gmask, sop, *text, *answer]])
        layout = reading.read(ids)
        arguments = {"text": text, "answer": answer, "gmask": gmask, "sop": sop}
        yield Case(arguments, {"ids": ids, "positions": layout.positions, "visible": layout.visible})


EXERCISES = [
    Exercise("2.1", "cut_out", cases=cut_out_cases),
    Exercise("2.2", "infilling_layout", cases=infilling_layout_cases),
    Exercise("2.3", "chatglm_layout", cases=chatglm_layout_cases),
    Exercise("2.4", "next_token", cases=next_token_cases),
    Exercise("2.5", "chatglm2_layout", cases=chatglm2_layout_cases),
]
