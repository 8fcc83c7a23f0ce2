"""glm/blanks.py against the official builders of inputs, and scores and blanks filled in turn against plain passes."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_folders import PROJECT
from torch import Tensor

import glm
from glm.blanks import Rows, ask, compare, score, teach
from glm.errors import GLMError, LayoutError, PromptError
from glm.family import glm_10b, glm_130b
from glm.generation import generate
from glm.infilling import IGNORED, Sample, fill, loss
from glm.layout import Layout
from glm.model import GLM
from glm.tokenizer import Tokenizer

VOCABULARIES = Path(os.environ.get("GLM_TOKENIZERS", PROJECT.parent / "shared" / "tokenizers"))
SPEC = glm_10b.build(layers=2, width=32, heads=2, vocabulary=50304, context=64)
SOP, EOP, MASK, SMASK, GMASK, PAD = 50257, 50258, 50260, 50264, 50263, 50256
TWO = "The capital of [MASK] is a city of [sMASK] people."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    if not (VOCABULARIES / "glm-10b").is_dir():
        pytest.skip(f"no vocabulary of glm-10b: put it under {VOCABULARIES} or set GLM_TOKENIZERS")
    return Tokenizer.from_pretrained(VOCABULARIES / "glm-10b")


@pytest.fixture(scope="module")
def model() -> GLM:
    """Random weights, loud enough that every token says something else."""
    made = GLM(SPEC, dtype=torch.float64, seed=3).train(False)
    with torch.no_grad():
        for x in made.parameters():
            x.mul_(8 if x.dim() == 2 else 1)
    return made


# -- the official builders ---------------------------------------------------------------------------------------------


def official(kind: str) -> list[dict[str, Any]]:
    lines = (VOCABULARIES / "glm-10b" / "visible.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    assert found
    return found


def same(rows: Rows, row: dict[str, Any], mask: str) -> None:
    assert rows.ids.tolist() == row["input_ids"]
    assert rows.layout.positions.transpose(1, 2).tolist() == row["position_ids"]
    assert rows.layout.visible[:, None].long().tolist() == row[mask]


def test_inputs_for_generation(tokenizer: Tokenizer) -> None:
    for row in official("build_inputs_for_generation"):
        contexts = [tokenizer.encode(text, special=True) for text in row["texts"]]
        same(ask(SPEC.reading, contexts, PAD, row["max_gen_length"]), row, "generation_attention_mask")
        if len(contexts) == 1:
            assert [*contexts[0], SOP] == tokenizer.infill(row["texts"][0])


def test_inputs_for_training(tokenizer: Tokenizer) -> None:
    for row in official("build_inputs_for_training"):
        contexts = [tokenizer.encode(text, special=True) for text in row["texts"]]
        targets = [tokenizer.encode(text) for text in row["targets"]]
        rows = teach(SPEC.reading, contexts, targets, eop=EOP, pad=PAD, longest=row["max_gen_length"])
        same(rows, row, "attention_mask")
        assert rows.targets is not None
        assert rows.targets.tolist() == row["labels"]


def test_inputs_for_multiple_choice(tokenizer: Tokenizer) -> None:
    for row in official("build_inputs_for_multiple_choice"):
        contexts = [tokenizer.encode(text, special=True) for text in row["texts"]]
        choices = [[tokenizer.encode(text) for text in texts] for texts in row["choices"]]
        rows = compare(SPEC.reading, contexts, choices, PAD)
        same(rows, row, "attention_mask")
        assert choices == row["choice_ids"]
        assert [[list(where) for where in places] for places in rows.candidates] == row["choice_indices"]


def test_targets_that_are_too_long_are_cut() -> None:
    rows = teach(SPEC.reading, [[1, MASK]], [[5, 6, 7, 8]], eop=EOP, pad=PAD, longest=3)
    assert rows.ids.tolist() == [[1, MASK, SOP, 5, 6]]
    assert rows.targets is not None
    assert rows.targets.tolist() == [[IGNORED, IGNORED, 5, 6, 7]]


def test_a_context_without_a_blank() -> None:
    for make in (lambda: ask(SPEC.reading, [[1, 2]], PAD, 3), lambda: compare(SPEC.reading, [[1, 2]], [[[3]]], PAD)):
        with pytest.raises(LayoutError, match="start tokens"):
            make()
    for choices in ([], [[]], [[3], []]):
        with pytest.raises(PromptError, match="nothing to compare"):
            compare(SPEC.reading, [[1, MASK]], [choices], PAD)


# -- what they compute -------------------------------------------------------------------------------------------------


@torch.inference_mode()
def alone(model: GLM, context: list[int], blank: int, choice: list[int]) -> float:
    """The log-probability of one candidate in a pass of its own."""
    ids = torch.tensor([[*context, SOP, *choice[:-1]]])
    layout = Layout.blanks(len(context), [(blank, len(choice))])
    logits = model(ids, layout)[0, len(context) :].log_softmax(-1)
    return float(logits[torch.arange(len(choice)), torch.tensor(choice)].sum())


@torch.inference_mode()
def test_candidates_do_not_see_each_other_nor_padding(model: GLM) -> None:
    contexts = [[7, 8, MASK, 9], [5, GMASK]]
    choices = [[[1, 2, 3], [4], [1, 2]], [[6, 6], [3]]]
    rows = compare(SPEC.reading, contexts, choices, PAD)
    logits = model(rows.ids, rows.layout).log_softmax(-1)
    for row, (context, blank) in enumerate(zip(contexts, (2, 1), strict=True)):
        for where, choice in zip(rows.candidates[row], choices[row], strict=True):
            found = sum(float(logits[row, at, id]) for at, id in zip(where, choice, strict=True))
            assert found == pytest.approx(alone(model, context, blank, choice), rel=1e-12)


def test_scores(model: GLM, tokenizer: Tokenizer) -> None:
    text, candidates = "Tsinghua University is located in [MASK].", ["Beijing", "Shanghai", "a"]
    context = tokenizer.encode(text, special=True)
    expected = [alone(model, context, context.index(MASK), tokenizer.encode(choice)) for choice in candidates]
    assert glm.score(model, tokenizer, text, candidates) == pytest.approx(expected, rel=1e-12)
    with pytest.raises(PromptError, match=r"\[MASK\] or \[sMASK\] or \[gMASK\], not 0"):
        score(model, tokenizer, "nothing", candidates)
    with pytest.raises(PromptError, match="nothing to compare"):
        score(model, tokenizer, text, ["a", ""])
    with pytest.raises(GLMError, match="fills no blanks"):
        score(GLM.from_release("chatglm3-6b", device="meta"), tokenizer, text, candidates)


def test_the_embedded_model_prefers_what_it_would_write() -> None:
    source, text = glm.embedded(), "GLM is taught with [MASK] instead."
    model, tokenizer = GLM.from_pretrained(source), Tokenizer.from_pretrained(source)
    [written] = fill(model, tokenizer, text).blanks
    scores = score(model, tokenizer, text, [written, "a spoon", written[::-1]])
    assert scores[0] == max(scores) > -10 > scores[1]


@torch.inference_mode()
def test_the_loss_is_not_shifted(model: GLM) -> None:
    contexts, targets = [[7, 8, MASK, 9], [5, SMASK]], [[1, 2, 3], [4]]
    rows = teach(SPEC.reading, contexts, targets, eop=EOP, pad=PAD)
    assert rows.targets is not None
    said = []
    for context, blank, target in zip(contexts, (2, 1), targets, strict=True):
        said += [alone(model, context, blank, [*target, EOP])]
    found = loss(model(rows.ids, rows.layout), rows.targets)
    assert found.item() == pytest.approx(-sum(said) / 6, rel=1e-12)  # three tokens, one, and two <eop>


# -- blanks filled in turn ---------------------------------------------------------------------------------------------


def test_blanks_are_filled_in_turn(model: GLM, tokenizer: Tokenizer) -> None:
    """What is written is the likeliest in one plain pass over the row, in the layout of the training objective."""
    filled = fill(model, tokenizer, TWO, max_new_tokens=4)
    context = tokenizer.infill(TWO)[:-1]
    places = [i for i, id in enumerate(context) if id in (MASK, SMASK)]
    first = generate(model, [[*context, SOP]], max_new_tokens=4)[0]
    second = generate(model, [[*context, SOP, *first, SOP]], max_new_tokens=4)[0]
    assert first != second
    assert filled.blanks == [tokenizer.decode(ids, special=False).strip() for ids in (first, second)]
    ids = [*context, SOP, *first, SOP, *second]
    layout = Layout.blanks(len(context), [(places[0], len(first) + 1), (places[1], len(second) + 1)])
    likeliest: Tensor = model(torch.tensor([ids]), layout)[0].argmax(-1)
    assert likeliest[len(context) : len(context) + len(first)].tolist() == first
    assert likeliest[len(context) + len(first) + 1 :][: len(second)].tolist() == second
    before, between, after = "The capital of ", " is a city of ", " people."
    assert filled.text.startswith(before.strip())
    assert between.strip() in filled.text
    assert filled.text.endswith(after.strip())


def test_a_text_without_a_blank(model: GLM, tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="no \\[MASK\\]"):
        fill(model, tokenizer, "nothing missing")


def test_rows_of_different_length_do_not_meet(model: GLM) -> None:
    prompts = [[7, 8, MASK, 9, PAD, SOP], [5, GMASK, PAD, SOP], [5, MASK, 6, SMASK, PAD, SOP, 3, 4, SOP]]
    together = generate(model, prompts, max_new_tokens=5)
    assert together == [generate(model, [prompt], max_new_tokens=5)[0] for prompt in prompts]
    sample = Sample(prompts[2][:5], [(1, [3, 4]), (3, [])], glm.infilling.Marks(MASK, GMASK, SOP, EOP))
    assert sample.ids == prompts[2]  # the objective's own row
    assert torch.equal(SPEC.reading.read(torch.tensor([prompts[2]])).positions, sample.layout.positions)


def test_a_text_longer_than_was_learnt(model: GLM) -> None:
    with pytest.raises(LayoutError, match="position 65 is none of the 65"):
        generate(model, [[*[5] * 65, MASK, SOP]], max_new_tokens=1)


# -- GLM-130B ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[GLM, Tokenizer]:
    if not (VOCABULARIES / "chatglm-6b").is_dir():
        pytest.skip(f"no vocabulary of chatglm-6b: put it under {VOCABULARIES} or set GLM_TOKENIZERS")
    folder = tmp_path_factory.mktemp("glm-130b")
    (folder / "ice_text.model").write_bytes((VOCABULARIES / "chatglm-6b" / "ice_text.model").read_bytes())
    spec = glm_130b.build(
        layers=1, width=16, inner=24, heads=2, vocabulary=150528, context=64, eps=1e-5,
        sop=150004, fixed=(150000, 150002), gmask=150001, stop=(150005, 20002),
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(glm_130b.config(spec)))
    return GLM(spec, seed=0).train(False), Tokenizer.from_pretrained(folder)


def test_glm_130b_reads_the_vocabulary_behind_image_ids(large: tuple[GLM, Tokenizer]) -> None:
    tok = large[1]
    plain = Tokenizer.from_pretrained(VOCABULARIES / "chatglm-6b")
    text = "清华大学 GLM  x\n"
    assert tok.encode(text) == [id + 20000 for id in plain.encode(text)]
    assert tok.stop == (150005, 20002)
    assert [tok.id(name) for name in ("[MASK]", "[gMASK]", "[sMASK]", "<sop>")] == [150000, 150001, 150002, 150004]
    assert tok.infill("ab [MASK] c") == [*tok.encode("ab "), 150000, *tok.encode(" c"), 20002, 150004]
    assert tok.infill("ab [gMASK]") == [*tok.encode("ab "), 150001, 150004]  # what ends in a blank is not closed
    assert tok.continuation("ab") == [*tok.encode("ab"), 150001, 150004]
    assert tok.decode(tok.encode(text)) == text
    with pytest.raises(PromptError, match="not trained to converse"):
        tok.chat([{"role": "user", "content": "hi"}])


def test_glm_130b_fills_one_blank_after_another(large: tuple[GLM, Tokenizer]) -> None:
    model, tok = large
    filled = fill(model, tok, "a [gMASK] b [MASK] c", max_new_tokens=3)
    [ids] = generate(model, [tok.infill("a [gMASK] b [MASK] c")], max_new_tokens=3)
    assert filled.blanks[0] == tok.decode(ids, special=False).strip()  # [MASK] comes first, wherever it stands
    assert len(filled.blanks) == 2
    assert "MASK" not in filled.text
