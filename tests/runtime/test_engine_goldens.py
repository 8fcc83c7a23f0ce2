"""The engine on every golden: of references in float64, of kernels in float16 and float32.

In float64 its logits are those of the pure model to 1e-10 of their rms, read at once, in pieces, token by token and
several tokens at a time. In the interpreter, where the kernels themselves compute, they are at most twice as far from
float64 as those of the pure model in the same dtype, by the largest error and by the rms of all texts of a golden.
"""

import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from harness import DTYPES, directly, judge, kernel, needs_triton, rerun
from texts import ALL, texts
from torch import Tensor

import glm
from glm import GLM, Engine
from glm.errors import LayoutError
from glm.layout import Blank, Layout
from glm.runtime import decoding, norms, sampling
from glm.runtime.composed import Composed
from glm.verify import verify

NAMES = sorted(ALL)
ROOM = 64
EVERY = bool(os.environ.get("GLM_ALL_GOLDENS"))
SOME = (
    "chatglm3-sensitive", "hf_glm4_moe_lite-sensitive", "glm130b-base", "hf_glm4-sensitive",
    "chatglm1-int4", "chatglm2-int8", "hf_glm4_moe-air", "hf_glm_moe_dsa-base",
)  # fmt: skip


def engine_of(model: GLM, **options: int) -> Engine:
    return Engine(model, max_length=ROOM, **options)


@torch.inference_mode()
def pure(model: GLM, ids: list[int], layout: Layout | None) -> Tensor:
    """Logits [T, V] of the pure model."""
    return model(torch.tensor([ids]), layout)[0]


@torch.inference_mode()
def decoded(engine: Engine, ids: list[int], prompt: int, at_once: int) -> Tensor:
    """Logits [T - prompt, V] of the tokens behind a prompt, fed `at_once` at a time by the step that decodes.

    The row of the engine says where it is; what it is to read is put in by hand.
    """
    request = engine.submit(ids[:prompt], max_new_tokens=len(ids), stop=())
    engine.waiting.clear()
    engine.seats.take(request, reusable=False)
    request.state = "reading"
    while request.state == "reading":
        engine.read_on(request)
    [slot] = engine.seats.writing()
    found = []
    for start in range(prompt, len(ids), at_once):
        tokens = torch.tensor([ids[start : start + at_once]])
        engine.rows.length[slot] = engine.rows.at[slot] + tokens.shape[1]
        found.append(engine.composed.logits(decoding.read(engine.composed, engine.slots, engine.rows, tokens))[0])
        engine.rows.at[slot] += tokens.shape[1]
        engine.rows.positions[slot] += tokens.shape[1] * engine.rows.steps[slot]
    engine.cancel(request)
    return torch.cat(found)


def close(ours: Tensor, truth: Tensor) -> None:
    """To 1e-10 of the rms."""
    assert ours.shape == truth.shape
    assert (ours - truth).abs().max() <= 1e-10 * truth.square().mean().sqrt()


def begun(model: GLM, ids: list[int], least: int) -> int | None:
    """From how many tokens on, at least `least`, a text can be continued; one that fills a blank has to begin to."""
    reading = model.spec.reading
    for count in range(least, len(ids)):
        if isinstance(reading, Blank) and reading.sop not in ids[:count]:
            continue
        with suppress(LayoutError):
            if not model.layout(torch.tensor([ids[:count]])).reading:
                return count
    return None


@directly
@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str) -> None:
    model = GLM.from_pretrained(ALL[name], dtype=torch.float64)
    engine, in_pieces = engine_of(model), engine_of(model, chunk=3)
    some = 0
    for ids, layout in texts(ALL[name]):
        truth = pure(model, ids, layout)
        close(engine.read(ids, layout), truth)
        close(in_pieces.read(ids, layout), truth)
        prompt = begun(model, ids, len(ids) // 2) if layout is None else None
        if prompt is not None:
            some += 1
            close(decoded(engine, ids, prompt, 1), truth[prompt:])
            close(decoded(engine, ids, prompt, 3), truth[prompt:])
    assert some, "nothing was decoded"


@directly
@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_and_samples(name: str) -> None:
    model = GLM.from_pretrained(ALL[name], dtype=torch.float64)
    prompts = [ids[:-1] for ids, layout in texts(ALL[name]) if layout is None and begun(model, ids, len(ids) - 1)][:3]
    assert prompts
    engine = Engine(model, max_batch=2, max_length=128, chunk=4)
    sampling = {"temperature": 0.9, "top_k": 40, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 7}
    for how in ({}, sampling):
        plain = glm.generate(model, prompts, max_new_tokens=12, **how)
        assert engine.generate(prompts, max_new_tokens=12, **how) == plain
        assert glm.generate(engine, prompts, max_new_tokens=12, **how) == plain


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_kernels(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shortest text of some goldens, of all where EVERY says so; read, and its last tokens decoded."""
    if not EVERY and name not in (SOME if dtype is torch.float16 else SOME[:4]):
        pytest.skip("a slow test runs it: make test-slow")
    monkeypatch.setattr(norms, "FOLDED", norms.FOLDED | ({dtype} if "sensitive" in name else set()))
    model = GLM.from_pretrained(ALL[name], dtype=dtype)
    exact = GLM.from_pretrained(ALL[name], dtype=dtype).double()
    engine = engine_of(model, chunk=8)
    ids, _ = shortest(model, ALL[name])
    prompt = begun(model, ids, len(ids) - 3)
    assert prompt is not None
    ours = torch.cat((engine.read(ids), decoded(engine, ids, prompt, 1), decoded(engine, ids, prompt, 2)))
    plain, truth = (torch.cat((x, x[prompt:], x[prompt:])) for x in (pure(model, ids, None), pure(exact, ids, None)))
    judge(ours, plain, truth)


def shortest(model: GLM, folder: Path) -> tuple[list[int], Layout | None]:
    """The shortest text that can be decoded."""
    every = sorted(texts(folder), key=lambda text: len(text[0]))
    return next((ids, layout) for ids, layout in every if layout is None and begun(model, ids, len(ids) - 3))


@kernel
@pytest.mark.parametrize("tokens", [4, pytest.param(200, marks=pytest.mark.skipif(not EVERY, reason="takes minutes"))])
def test_tiny_glm_says_the_same(tokens: int) -> None:
    """Greedy ids of the kernels in float32, as many as are asked for, beside those of the pure model."""
    pure = GLM.from_pretrained(glm.embedded(), dtype=torch.float32)
    tokenizer = glm.Tokenizer.from_pretrained(glm.embedded())
    prompt = tokenizer.chat([{"role": "user", "content": "What is blank infilling?"}])
    engine = Engine(pure, max_length=len(prompt) + tokens)
    new = engine.generate([prompt], max_new_tokens=tokens, stop=())
    assert len(new[0]) == tokens
    assert new == glm.generate(pure, [prompt], max_new_tokens=tokens, stop=())


@directly
@needs_triton
def test_in_the_interpreter() -> None:
    rerun(__file__, at_least=len(SOME) + 5)


@directly
@needs_triton
@pytest.mark.slow
def test_all_goldens_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLM_ALL_GOLDENS", "1")
    rerun(__file__, at_least=2 * len(NAMES) + 2)


def test_a_layout_that_is_no_rule_is_refused() -> None:
    model = GLM.from_pretrained(ALL["chatglm3-base"], dtype=torch.float64)
    engine = Engine(model, max_length=16)
    visible = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    visible[0, 3, 1] = False
    with pytest.raises(LayoutError, match="the engine reads one text"):
        engine.read([1, 2, 3, 4], Layout(torch.arange(4)[None, :, None], visible))


@directly
def test_verify_asks_the_engine_too(monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(ALL["chatglm3-base"], engine=True)
    assert report.ok
    assert sum(row.quantity == "logits, engine" for row in report.rows) == 4
    assert any(row.quantity == "greedy, engine" for row in report.rows)
    whole = sampling.likeliest
    monkeypatch.setattr(sampling, "likeliest", lambda logits: whole(-logits))
    wrong = {row.quantity for row in verify(ALL["chatglm3-base"], engine=True).rows if not row.ok}
    assert wrong == {"greedy, engine"}
    monkeypatch.setattr(Composed, "logits", lambda self, x: self.head(x))
    wrong = {row.quantity for row in verify(ALL["chatglm3-base"], engine=True).rows if not row.ok}
    assert wrong == {"greedy, engine", "logits, engine"}
