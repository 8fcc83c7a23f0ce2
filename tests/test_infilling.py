"""The objective: samples as the paper draws them, spans as promised, padding that nobody sees, blanks filled in."""

import random
from collections.abc import Iterator
from statistics import mean, variance

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from glm.errors import GLMError, PromptError
from glm.family import release
from glm.family.chatglm import build
from glm.infilling import (
    CLAUSE_ENDS,
    IGNORED,
    SENTENCE_ENDS,
    Marks,
    Sample,
    answered,
    apart,
    asked,
    batch,
    blanked,
    continued,
    cuts,
    join,
    long_start,
    poisson,
    runs,
    sentence_spans,
    short_spans,
    units,
)
from glm.model import GLM

steady = settings(derandomize=True, deadline=None, max_examples=60)
MARKS = Marks(mask=90, gmask=91, sop=92, eop=93)
ENGLISH = "The model reads a page with holes. It writes, word by word, what was cut out! Nothing else?"
CHINESE = "模型读一页有洞的书，再逐字写回；不多不少。GLM 就是这样学的！版本 1.5 也一样。"
MIXED = f"{ENGLISH} {CHINESE}"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def letters(text: str) -> list[int]:
    """An encoding in which every character is one id, far from the marks."""
    return [1000 + ord(letter) for letter in text]


def tiny() -> GLM:
    spec = build(
        layers=2,
        width=16,
        inner=32,
        heads=2,
        vocabulary=100,
        context=64,
        eps=1e-5,
        two_axes=True,
        sop=92,
        mask=90,
        gmask=91,
        pad=0,
        stop=(93,),
    )
    model = GLM(spec, device="cpu", dtype=torch.float64, seed=3)
    with torch.no_grad():
        for x in model.parameters():  # far from the small start, so that a wrong mask or position shows
            x.mul_(8) if x.dim() > 1 else x.add_(0.1)
    return model


SAMPLES = [
    Sample([1, 2, 90, 4, 90], [(4, [5, 6]), (2, [3])], MARKS),
    Sample([7, 91], [(1, [8, 9, 10, 11])], MARKS),
    Sample([90, 12, 13, 14, 15, 16, 17, 18], [(0, [19])], MARKS),
]


# -- one row -----------------------------------------------------------------------------------------------------------


def test_the_example_of_the_file() -> None:
    sample = SAMPLES[0]
    assert sample.ids == [1, 2, 90, 4, 90, 92, 5, 6, 92, 3]
    assert sample.targets == [*[IGNORED] * 5, 5, 6, 93, 3, 93]
    assert sample.layout.positions[0].T.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4, 2, 2], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]]
    assert len(sample) == len(sample.ids) == len(sample.targets)
    sees = sample.layout.visible[0]
    assert sees[:5].tolist() == [[True] * 5 + [False] * 5] * 5  # what is read sees all of itself and nothing else
    assert sees[5:].tolist() == [[True] * (6 + i) + [False] * (4 - i) for i in range(5)]


def test_one_blank_is_laid_out_as_the_release_reads_it() -> None:
    for sample in SAMPLES[1:]:
        reading = tiny().spec.reading.read(torch.tensor([sample.ids]))
        assert torch.equal(reading.positions, sample.layout.positions)
        assert torch.equal(reading.visible, sample.layout.visible)


def test_a_batch_teaches_what_its_rows_teach() -> None:
    model = tiny()
    ids, targets, layout = batch(SAMPLES, pad=0)
    assert ids.shape == targets.shape == (3, 10)
    logits = model(ids, layout)
    for row, sample in enumerate(SAMPLES):
        alone = model(torch.tensor([sample.ids]), sample.layout)[0]
        assert (logits[row, : len(sample)] - alone).abs().max() < 1e-12
        assert targets[row, len(sample) :].eq(IGNORED).all()
        wanted = F.cross_entropy(alone, torch.tensor(sample.targets), ignore_index=IGNORED)
        assert F.cross_entropy(logits[row], targets[row], ignore_index=IGNORED).item() == pytest.approx(wanted.item())


def test_a_later_span_depends_on_an_earlier_one_and_not_the_other_way() -> None:
    model, sample = tiny(), SAMPLES[0]

    def logits(written: list[tuple[int, list[int]]]) -> torch.Tensor:
        changed = Sample(sample.read, written, MARKS)
        return model(torch.tensor([changed.ids]), changed.layout)[0]

    before = logits([(4, [5, 6]), (2, [3])])
    assert (logits([(4, [5, 6]), (2, [30])])[:9] - before[:9]).abs().max() == 0
    assert (logits([(4, [5, 60]), (2, [3])])[8:] - before[8:]).abs().max() > 1e-3


def put_back(sample: Sample) -> list[int]:
    """The text of a sample with its spans in their places."""
    written = dict(sample.written)
    return [id for place, read in enumerate(sample.read) for id in written.get(place, [read])]


@steady
@given(st.sampled_from([ENGLISH, CHINESE, MIXED]), st.randoms(use_true_random=False))
def test_nothing_is_lost_between_the_blanks(text: str, rng: random.Random) -> None:
    pieces = units(text)
    sample = blanked(pieces, cuts(pieces, rng), letters, MARKS, rng)
    assert "".join(chr(id - 1000) for id in put_back(sample)).replace(" ", "") == text.replace(" ", "")
    assert sorted(place for place, _ in sample.written) == [i for i, id in enumerate(sample.read) if id == MARKS.mask]


def test_white_space_beside_a_blank_is_dropped() -> None:
    pieces = units("one two three four")
    sample = blanked(pieces, [(1, 2)], letters, MARKS, random.Random(0))
    assert sample.read == [*letters("one"), 90, *letters("three four")]
    assert sample.written == [(3, letters("two"))]


def test_spans_are_written_in_every_order() -> None:
    pieces, spans = units("a b c d e f"), [(0, 1), (2, 3), (4, 5)]
    rng = random.Random(0)
    orders = {tuple(place for place, _ in blanked(pieces, spans, letters, MARKS, rng).written) for _ in range(200)}
    assert len(orders) == 6


def test_a_continuation_and_an_answer_fill_a_gmask() -> None:
    sample = continued(units("ab cd ef"), 1, letters, MARKS)
    assert (sample.read, sample.written) == ([*letters("ab"), 91], [(2, letters("cd ef"))])
    assert continued(units("ab"), 0, letters, MARKS).read == [91]
    assert answered([5, 6, 91], [7], MARKS).ids == [5, 6, 91, 92, 7]


# -- where a text may be cut -------------------------------------------------------------------------------------------


def test_units() -> None:
    assert units("GLM-4 reads, 不写。  Done") == ["GLM", "-", "4 ", "reads", ", ", "不", "写", "。  ", "Done"]


@steady
@given(st.text())
def test_units_are_the_text(text: str) -> None:
    assert "".join(units(text)) == text


def test_sentences_and_clauses() -> None:
    pieces = units(MIXED)
    sentences = ["".join(pieces[a:b]).strip() for a, b in runs(pieces, SENTENCE_ENDS)]
    assert sentences[0] == "The model reads a page with holes."
    assert sentences[3:] == ["模型读一页有洞的书，再逐字写回；不多不少。", "GLM 就是这样学的！", "版本 1.5 也一样。"]
    clauses = ["".join(pieces[a:b]).strip() for a, b in runs(pieces, CLAUSE_ENDS)]
    assert clauses[1:4] == ["It writes,", "word by word,", "what was cut out!"]
    assert runs(["a ", "b"], SENTENCE_ENDS) == [(0, 2)]


@steady
@given(st.integers(2, 300), st.randoms(use_true_random=False))
def test_short_spans(length: int, rng: random.Random) -> None:
    spans = short_spans(length, rng)
    assert spans == sorted(spans)
    assert all(0 <= start < end <= length for start, end in spans)
    assert all(apart(span, spans[:i]) for i, span in enumerate(spans))
    assert 1 <= sum(end - start for start, end in spans) <= max(1, round(0.15 * length))


def test_short_spans_cover_their_share_in_poisson_lengths() -> None:
    rng = random.Random(1)
    drawn = [short_spans(400, rng) for _ in range(200)]
    assert mean(sum(end - start for start, end in spans) for spans in drawn) > 59.9  # of 60
    lengths = [end - start for spans in drawn for start, end in spans]
    assert 2.8 < mean(lengths) < 3.2
    numbers = [poisson(3.0, rng) for _ in range(5000)]
    assert abs(mean(numbers) - 3) < 0.1
    assert abs(variance(numbers) - 3) < 0.25


def test_whole_sentences_are_cut() -> None:
    pieces, rng = units(MIXED), random.Random(2)
    found = set(runs(pieces, SENTENCE_ENDS))
    for _ in range(50):
        spans = sentence_spans(pieces, rng)
        assert spans
        assert set(spans) <= found
        assert all(apart(span, spans[:i]) for i, span in enumerate(spans))
    assert sentence_spans(units("Only one sentence here."), rng) not in ([], [(0, 5)])


def test_a_long_span_is_half_the_text_or_more() -> None:
    rng = random.Random(3)
    starts = [long_start(40, rng) for _ in range(2000)]
    assert (min(starts), max(starts)) == (0, 20)
    assert abs(mean(starts) - 10) < 0.5


@steady
@given(st.sampled_from([ENGLISH, CHINESE, MIXED, "two words", "word"]), st.randoms(use_true_random=False))
def test_cuts(text: str, rng: random.Random) -> None:
    pieces = units(text)
    spans = cuts(pieces, rng)
    assert 1 <= len(spans) <= 8
    assert spans == sorted(spans)
    assert all(0 <= start < end <= len(pieces) for start, end in spans)
    assert all(apart(span, spans[:i]) for i, span in enumerate(spans))
    if len(pieces) > 2:
        assert 3 * sum(end - start for start, end in spans) <= 2 * len(pieces)


def test_cuts_are_of_every_kind() -> None:
    pieces, rng = units(MIXED), random.Random(4)
    single = [spans[0] for spans in (cuts(pieces, rng) for _ in range(4000)) if len(spans) == 1]
    found = set(runs(pieces, SENTENCE_ENDS))
    assert any(start == 0 for start, _ in single)
    assert any(end == len(pieces) for _, end in single)
    assert found & set(single)
    assert {end - start for start, end in single} >= set(range(1, 20))
    assert {start for start, _ in single} >= set(range(len(pieces) // 2))


# -- filling blanks (with a trained model: test_training.py, test_tiny_glm.py) -----------------------------------------


def test_the_prompt_asks_as_the_objective_taught() -> None:
    sample = blanked(units("one two three"), [(1, 2)], letters, MARKS, random.Random(0))
    assert asked(["one ", " three "], letters, MARKS) == [*sample.read, MARKS.sop]
    assert asked(["one", "", "three"], letters, MARKS) == [*letters("one"), 90, 90, *letters("three"), 92]


@pytest.mark.parametrize(
    ("left", "right", "whole"),
    [
        ("a blank ", "is filled", "a blank is filled"),
        ("a blank", "is filled", "a blank is filled"),
        ("a blank", " is filled", "a blank is filled"),
        ("a blank ", ", then", "a blank, then"),
        ("a blank", ", then", "a blank, then"),
        ("wait,", "then", "wait, then"),
        ("wait,", "然后", "wait,然后"),
        ("thirty-", "two", "thirty-two"),
        ("(", "see", "(see"),
        ("模型 ", "学习", "模型学习"),
        ("模型", "学习", "模型学习"),
        ("模型 ", "GLM", "模型 GLM"),
        ("模型", "GLM", "模型GLM"),
        ("模型 ", "，再", "模型，再"),
        ("end.\n", "New", "end.\nNew"),
        ("", "Start", "Start"),
        ("  ", "Start", "  Start"),
        ("end", "", "end"),
    ],
)
def test_join(left: str, right: str, whole: str) -> None:
    assert join(left, right) == whole


def test_a_model_that_reads_from_left_to_right_fills_no_blanks() -> None:
    with pytest.raises(GLMError, match="fills no blanks"):
        Marks.of(release("chatglm3-6b").spec)
    marks = Marks.of(release("chatglm-6b").spec)
    assert marks == Marks(mask=130000, gmask=130001, sop=130004, eop=130005)


def test_a_text_without_a_blank_is_refused() -> None:
    from glm.infilling import fill

    with pytest.raises(PromptError, match="no \\[MASK\\]"):
        fill(tiny(), None, "nothing missing")  # type: ignore[arg-type]
