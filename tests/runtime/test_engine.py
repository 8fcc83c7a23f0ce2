"""The engine as its users meet it: tokens of `glm.generate` whatever comes and goes, clear refusals, nothing kept."""

import gc
import os
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import psutil
import pytest
import torch
from glm_kernels.overlap import AHEAD, TILES
from hypothesis import given
from hypothesis import strategies as st
from test_drafting import Told
from test_generation import blank_spec, cases, choices, few, model_of, native_spec, prompt_for, sandwich_spec, steady
from torch import Tensor, nn
from two_processes import TOYS, even, made
from two_processes import prompts as toy_prompts

import glm
from glm import GLM, Engine, PromptLookup, SmallerModel
from glm.attention import Attention, AttentionModule
from glm.cache import Memory
from glm.errors import CacheError, ConfigError, GenerationError, LayoutError
from glm.layout import Blank, Causal, Layout, Mask
from glm.linear import Linear, Weights
from glm.positions import Rotation
from glm.runtime import Request, attention, feed_forward, matrices, norms
from glm.runtime.call import Call, Prompt

LONG = 64


def plain(model: GLM, prompt: list[int], count: int, **how: Any) -> list[int]:
    """What the pure model says to a single prompt."""
    [ids] = glm.generate(model, [prompt], max_new_tokens=count, **how)
    return ids


def model() -> GLM:
    return model_of(native_spec(), 3)


def wide_model(layers: int) -> GLM:
    """One whose rows integers fit in groups of 128, with room for some hundred tokens: what a GPU is tried on."""
    return model_of(native_spec(512, layers, groups=2, each=4, head_width=64, width=256, inner=384), 1)


def run(engine: Engine, *requests: Request) -> None:
    """Step until all of them are over."""
    for _ in range(1000):
        if not any(request.active for request in requests):
            return
        engine.step()
    raise AssertionError("the engine never ends")


# ----------------------------------------------------------------------------- the same tokens


@steady
@given(cases(), choices, st.integers(1, 3), st.integers(1, 5), st.integers(0, 1))
def test_tokens_are_those_of_generate(
    case: tuple[GLM, list[list[int]]], choice: dict[str, Any], batch: int, chunk: int, ahead: int
) -> None:
    """`ahead` is 1 on a GPU: the device is given a step before the one before is read."""
    model, prompts = case
    engine = Engine(model, max_batch=batch, max_length=LONG, chunk=chunk)
    engine.ahead = ahead
    new = engine.generate(prompts, max_new_tokens=9, **choice)
    assert new == glm.generate(model, prompts, max_new_tokens=9, **choice)
    assert list(engine.stream(prompts[0], max_new_tokens=9, **choice)) == new[0]
    for keep in (True, False):
        how = choice | {"stop": {new[0][-1] if new[0] else 0}, "keep_stop": keep}
        assert engine.generate(prompts, max_new_tokens=9, **how) == glm.generate(
            model, prompts, max_new_tokens=9, **how
        )


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_overlap_and_prompts_do_not(overlap: bool) -> None:
    """On a device that cannot, the tokens are the same and nothing else happens."""
    pure = model()
    engine = Engine(pure, max_length=LONG, overlap=overlap)
    seen, logits = [], engine.composed.logits

    def watched(x: Tensor) -> Tensor:
        seen.append(AHEAD.get())
        return logits(x)

    engine.composed.logits = watched  # type: ignore[method-assign]
    assert engine.generate([[3, 4, 5]], max_new_tokens=4, stop=()) == [plain(pure, [3, 4, 5], 4, stop=())]
    assert seen == [None] + [TILES if overlap else None] * 3
    assert AHEAD.get() is None


def test_stop_strings_and_nothing_asked_for() -> None:
    pure = model()
    engine = Engine(pure, max_batch=2, max_length=LONG)

    def decode(ids: list[int]) -> str:
        return "".join(chr(97 + id % 26) for id in ids)

    [text] = glm.generate(pure, [[3, 4]], max_new_tokens=12, stop=())
    how: dict[str, Any] = {"stop": (), "stop_text": decode(text[5:7]), "decode": decode}
    assert engine.generate([[3, 4]], max_new_tokens=12, **how) == [plain(pure, [3, 4], 12, **how)]
    assert list(engine.stream([3, 4], max_new_tokens=12, **how)) == plain(pure, [3, 4], 12, **how)
    assert engine.generate([[3, 4]], max_new_tokens=0) == [[]]
    assert engine.generate([], max_new_tokens=5) == []
    assert list(engine.stream([3], max_new_tokens=0)) == []


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_weights_become_integers(weights: str) -> None:
    """What comes out is what a model says whose matrices are those integers, written out."""
    from glm.grouped import fitting
    from glm.quantization import dequantize, quantize
    from glm.runtime.matrices import integer_form

    pure = model_of(even(native_spec()), 5)
    engine = Engine(pure, max_length=LONG, weights=weights)
    form = integer_form(weights, pure.spec.weights)
    assert form is not None
    twin = model_of(even(native_spec()), 5)
    for name, module in twin.named_modules():
        if isinstance(module, Linear) and name.startswith("blocks"):
            own = fitting(form, module.in_features)
            module.weight = nn.Parameter(dequantize(*quantize(module.weight.detach(), own), own))
    ids = [3, 4, 5, 6, 7]
    with torch.inference_mode():
        truth, before = twin(torch.tensor([ids]))[0], pure(torch.tensor([ids]))[0]
    assert (engine.read(ids) - truth).abs().max() < 1e-12 * truth.abs().max()
    assert (before - truth).abs().max() > 1e-4
    assert engine.generate([ids], max_new_tokens=9) == glm.generate(twin, [ids], max_new_tokens=9)


@pytest.mark.parametrize("tokens", [3, 4, 11])
def test_inner_channels_of_few_tokens_at_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are twice in memory, before and behind an activation."""
    monkeypatch.setattr(feed_forward, "ROWS", 4)
    pure = model_of(blank_spec(), 4)
    engine = Engine(pure, max_length=LONG)
    seen = []
    for block in engine.composed.blocks:
        sublayer = block.feed_forward
        assert isinstance(sublayer, feed_forward.FusedFeedForward)

        def watched(x: Tensor, activate: Any = sublayer.activate) -> Tensor:
            seen.append(x.shape[1])
            return activate(x)

        sublayer.activate = watched
    ids = [3] * tokens
    with torch.inference_mode():
        truth = pure(torch.tensor([ids]))[0]
    assert (engine.read(ids) - truth).abs().max() < 1e-12 * truth.abs().max()
    parts = [4] * (tokens // 4) + [tokens % 4] * (tokens % 4 > 0)
    assert seen == parts * len(engine.composed.blocks)


@pytest.mark.parametrize("weights", [None, "int8", "int4"])
def test_a_model_for_a_gpu(weights: str | None) -> None:
    """It takes integers of all kinds and overflows in no dtype, and what it says depends on what it was given."""
    engine = Engine(wide_model(3).half(), max_batch=4, max_length=256, weights=weights)
    new = engine.generate([[3, 4, 5], [6] * 40, [7, 8], [9]], max_new_tokens=60, stop=())
    assert len({tuple(ids) for ids in new}) == 4


@pytest.mark.parametrize("name", TOYS)
def test_every_kind_of_layer(name: str) -> None:
    pure = made(TOYS[name])
    prompts = toy_prompts(pure.spec)
    engine = Engine(pure, max_batch=2, max_length=LONG, chunk=4)
    with torch.inference_mode():
        for prompt in prompts:
            truth = pure(torch.tensor([prompt]))[0]
            assert (engine.read(prompt) - truth).abs().max() <= 1e-10 * truth.square().mean().sqrt()
    for how in ({}, {"temperature": 1.0, "seed": 5}):
        new = engine.generate([*prompts, prompts[0]], max_new_tokens=8, stop=(), **how)
        assert new == glm.generate(pure, [*prompts, prompts[0]], max_new_tokens=8, stop=(), **how)


class Doubled(nn.Module):
    """Twice what a module gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        return 2 * self.module(*given)


def twice(kind: type[nn.Module]) -> type[nn.Module]:
    """A subclass that gives twice as much."""

    def forward(self: Any, *given: Any) -> Any:
        return 2 * kind.forward(self, *given)

    return type(f"Twice{kind.__name__}", (kind,), {"forward": forward})


@pytest.mark.parametrize(
    "name", ["chatglm", "sandwich", "experts", "experts, groups, int8", "latent", "chatglm2, groups"]
)
@pytest.mark.parametrize("subclass", [True, False])
def test_whatever_is_changed_is_not_computed_otherwise(name: str, subclass: bool) -> None:
    """Every module of a block and the last norm and head, one at a time, replaced by one that gives twice as much."""
    changes = 0
    for where, module in list(made(TOYS[name]).named_modules()):
        parts = where.split(".")
        if (parts[0] == "blocks" and parts[1:2] != ["0"]) or parts[0] in ("", "embedding", "prefix") or len(parts) == 2:
            continue
        if where == "blocks" or isinstance(module, nn.Identity) or "Router" in type(module).__name__:
            continue
        if parts[-2:] == ["mixer", "up"]:
            continue  # latent attention takes its weight as well as its product
        pure = made(TOYS[name])
        changed = pure.get_submodule(where)
        if subclass:
            changed.__class__ = twice(type(changed))
        elif hasattr(changed, "weight") or parts[-1].startswith("wire") or parts[-1] in ("mixer", "feed_forward"):
            parent = pure.get_submodule(where.rpartition(".")[0])
            setattr(parent, parts[-1], Doubled(changed))
        else:
            continue
        prompt = toy_prompts(pure.spec)[0]
        try:
            with torch.inference_mode():
                truth = pure(torch.tensor([prompt]))[0]
        except (AttributeError, TypeError):
            continue  # the model itself needs more of it than a call
        engine = Engine(pure, max_length=LONG, chunk=4)
        assert (engine.read(prompt) - truth).abs().max() <= 1e-9 * truth.abs().max(), where
        assert engine.generate([prompt], max_new_tokens=4) == glm.generate(pure, [prompt], max_new_tokens=4), where
        changes += 1
    assert changes >= 8


def test_another_embedding_is_refused() -> None:
    pure = model()
    pure.embedding.__class__ = twice(nn.Embedding)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="no other embedding than tables"):
        Engine(pure, max_length=LONG)


def test_tiny_glm_says_the_same_for_200_tokens() -> None:
    folder = glm.embedded()
    pure, tokenizer = GLM.from_pretrained(folder, dtype=torch.float32), glm.Tokenizer.from_pretrained(folder)
    engine = Engine.from_pretrained(folder, dtype=torch.float32, device="cpu", max_batch=2, max_length=512)
    asked = "What is blank infilling?", "什么是空白填充？"
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in asked]
    new = engine.generate(prompts, max_new_tokens=200, stop=())
    assert [len(ids) for ids in new] == [200, 200]
    assert new == [plain(pure, prompt, 200, stop=()) for prompt in prompts]


# ----------------------------------------------------------------------------- many at once


@st.composite
def visits(draw: st.DrawFn) -> tuple[GLM, list[tuple[str, Any]]]:
    """A model, and what happens to its engine: requests come, are given up, and steps are made."""
    build = draw(st.sampled_from([native_spec, sandwich_spec, blank_spec]))
    spec = build()
    come = st.tuples(prompt_for(spec), st.integers(0, 12), choices)
    event = st.one_of(
        st.tuples(st.just("come"), come),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("cancel"), st.integers(0, 7)),
    )
    return model_of(spec, draw(st.integers(0, 50))), draw(st.lists(event, min_size=3, max_size=14))


@steady
@given(visits(), st.integers(1, 4), st.integers(1, 4), st.integers(0, 1))
def test_requests_come_and_go(case: tuple[GLM, list[tuple[str, Any]]], batch: int, chunk: int, ahead: int) -> None:
    """Each says what it says alone, or when it is cancelled the beginning of it; and every slot is free in the end."""
    model, events = case
    engine = Engine(model, max_batch=batch, max_length=32, chunk=chunk)
    engine.ahead = ahead
    requests: list[tuple[Request, list[int]]] = []
    for what, how in events:
        if what == "come":
            prompt, count, choice = how
            alone = glm.generate(model, [prompt], max_new_tokens=count, **choice)[0]
            requests.append((engine.submit(prompt, max_new_tokens=count, **choice), alone))
        elif what == "step":
            for _ in range(how):
                engine.step()
        elif requests:
            engine.cancel(requests[how % len(requests)][0])
        assert sum(holder is not None for holder in engine.seats.holders) <= batch
    run(engine, *(request for request, _ in requests))
    for request, alone in requests:
        if request.state == "cancelled":
            assert request.ids == alone[: len(request.ids)]
        else:
            assert (request.state, request.ids) == ("done", alone)
    assert engine.seats.holders == [None] * batch
    assert not engine.rows.busy.any()
    assert bool((engine.rows.at == engine.slots.nowhere).all())


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    engine = Engine(model(), max_batch=2, max_length=LONG, chunk=2)
    first = engine.submit([3], max_new_tokens=30, stop=())
    engine.step()
    second = engine.submit([5] * 20, max_new_tokens=2, stop=())
    counts = []
    while second.state in ("waiting", "reading"):
        engine.step()
        counts.append(len(first.ids))
    assert len(counts) == 10  # pieces of two tokens
    assert all(after == before + 1 for before, after in pairwise(counts))


def test_a_row_that_waits_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN in the slots of idle rows, and behind what is filled, harms nobody."""
    pure = model()
    engine = Engine(pure, max_batch=4, max_length=LONG)
    for layer in engine.slots.buffers:
        for buffer in layer:
            buffer.fill_(torch.nan)
    requests = [engine.submit(prompt, max_new_tokens=9, stop=()) for prompt in ([3, 4], [5, 6, 7], [8])]
    engine.step()
    engine.cancel(requests[1])
    run(engine, *requests)
    assert requests[0].ids == plain(pure, [3, 4], 9, stop=())
    assert requests[2].ids == plain(pure, [8], 9, stop=())


def test_a_mask_written_out_is_the_rule() -> None:
    """For mixers without a kernel; with a prefix that all see, and behind what was read before."""
    for queries, keys, prefix in ((5, 5, 0), (3, 8, 0), (5, 5, 4), (3, 8, 7)):
        positions = torch.arange(keys - queries, keys)[None, :, None]
        layout = Layout.rule(positions, keys, prefix=torch.tensor([prefix]) if prefix else None)
        prompt = Prompt(keys, layout.prefix_length)
        call = Call(torch.tensor([keys - queries]), torch.tensor([keys]), None, prompt)
        assert torch.equal(call.mask(queries, keys).allowed[:, 0], layout.visible)  # type: ignore[index]


def test_an_idle_row_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[Tensor] = []
    whole = attention.append_attention

    def watched(*operands: Any, **how: Any) -> Tensor:
        lengths.append(operands[-1])
        return whole(*operands, **how)

    monkeypatch.setattr(attention, "append_attention", watched)
    engine = Engine(model(), max_batch=4, max_length=LONG)
    requests = [engine.submit([3] * count, max_new_tokens=9, stop=()) for count in (2, 3, 4)]
    for _ in range(4):
        engine.step()
    engine.cancel(requests[1])
    lengths.clear()
    engine.step()
    assert [length.tolist()[1::2] for length in lengths] == [[0, 0]] * 2


def test_a_block_is_five_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many kernels as a layer should have; the rest of a step does not grow with the layers."""
    calls: list[str] = []

    def counted(name: str, whole: Any) -> Any:
        def call(*operands: Any, **how: Any) -> Any:
            calls.append(name)
            return whole(*operands, **how)

        return call

    for module, name in (
        (matrices, "dense_matmul"), (attention, "append_attention"), (attention, "rotary_append"),
        (norms, "rms_norm"), (attention, "append"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(norms, "FOLDED", frozenset({torch.float64}))
    engine = Engine(model_of(native_spec(layers=3), 1), max_length=LONG)
    request = engine.submit([3, 4], max_new_tokens=9, stop=())
    engine.step()
    calls.clear()
    engine.step()
    block = ["dense_matmul", "append_attention", *["dense_matmul"] * 3]
    assert calls == [*block * 3, "dense_matmul"]
    engine.cancel(request)


# ----------------------------------------------------------------------------- refusals


def test_what_is_too_long_is_refused_with_the_numbers() -> None:
    engine = Engine(model(), max_length=12)
    with pytest.raises(CacheError, match=r"prompt 1 has 6 tokens, and 7 new ones are asked for: the 12 of a slot"):
        engine.generate([[3], [3] * 6], max_new_tokens=7)
    assert not engine.waiting
    assert len(engine.generate([[3] * 6], max_new_tokens=6, stop=())[0]) == 6
    with pytest.raises(CacheError, match="13 tokens do not fit"):
        engine.read([3] * 13)
    engine.submit([3], max_new_tokens=4, stop=())
    engine.step()
    with pytest.raises(CacheError, match="every slot is taken"):
        engine.read([3])


def test_arguments_out_of_range() -> None:
    pure = model()
    for options in ({"max_batch": 0}, {"max_length": 0}, {"chunk": -1}, {"max_batch": 1.5}):
        with pytest.raises(GenerationError, match="is a whole number from 1"):
            Engine(pure, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='weights is "bf16", "int8", "int4"'):
        Engine(pure, weights="int3")
    engine = Engine(pure, max_length=LONG)
    for prompt, how in ([[], {}], [[999], {}], [[3], {"temperature": -1.0}], [[3], {"top_p": 0.0}]):
        with pytest.raises(GenerationError):
            engine.submit(prompt, max_new_tokens=4, **how)
    with pytest.raises(GenerationError, match="has its chunk and its draft from the beginning"):
        glm.generate(engine, [[3]], max_new_tokens=4, draft=PromptLookup())
    blank = Engine(model_of(blank_spec(), 1), max_length=LONG)
    reading = blank.spec.reading
    assert isinstance(reading, Blank)
    with pytest.raises(GenerationError, match="lacks the start token"):
        blank.submit([1, 2], max_new_tokens=4)
    with pytest.raises(LayoutError):
        blank.submit([1, reading.sop], max_new_tokens=4)
    assert not blank.waiting


def test_integers_are_not_made_of_integers() -> None:
    from texts import ALL

    folder = ALL["chatglm2-int4"]
    for weights in ("int8", "bf16"):
        with pytest.raises(ConfigError, match="are integers already"):
            Engine(GLM.from_pretrained(folder), weights=weights)
    dense = model()
    assert Engine(dense, max_length=9, weights="bf16").read([3, 4]).equal(Engine(dense, max_length=9).read([3, 4]))


def test_learnt_places_end() -> None:
    from texts import ALL

    pure = GLM.from_pretrained(ALL["glm10b-base"], dtype=torch.float64)
    assert pure.spec.learned is not None
    reading = pure.spec.reading
    assert isinstance(reading, Blank)
    engine = Engine(pure, max_length=4 * pure.spec.learned.length)
    prompt = [1] * (pure.spec.learned.length - 3) + [reading.masks[0], reading.sop]
    with pytest.raises(LayoutError, match="is none of the"):
        engine.submit([1, 2, 3, *prompt], max_new_tokens=4)


# ----------------------------------------------------------------------------- what a slot remembers


def test_a_conversation_reads_only_what_is_new() -> None:
    pure = model()
    engine = Engine(pure, max_batch=2, max_length=LONG)
    text, before = [3, 4, 5, 6, 7, 8, 9], 0
    for turn in range(3):
        request = engine.submit(text, max_new_tokens=5, stop=())
        run(engine, request)
        assert request.ids == plain(pure, text, 5, stop=())
        assert request.reused == before
        before = len(text) + 4  # the last new token was never read
        text = text + request.ids + [10 + turn]
    other = engine.submit([20, 21], max_new_tokens=3, stop=())
    run(engine, other)
    assert other.reused == 0
    again = engine.submit([*text[:9], 1, 2], max_new_tokens=3, stop=())
    run(engine, again)
    assert again.reused == 9, "the other request took the slot that was idle for longest"
    assert again.ids == plain(pure, [*text[:9], 1, 2], 3, stop=())


@few
@given(st.data())
def test_whatever_slots_remember(data: st.DataObject) -> None:
    """Prompts of few different tokens, so that they often begin alike."""
    pure = model()
    engine = Engine(pure, max_batch=2, max_length=LONG, chunk=3)
    for _ in range(8):
        prompt = data.draw(st.lists(st.integers(3, 4), min_size=1, max_size=6))
        request = engine.submit(prompt, max_new_tokens=3, stop=())
        run(engine, request)
        assert request.ids == plain(pure, prompt, 3, stop=())
        assert request.reused < len(prompt)


def test_what_is_read_both_ways_is_read_anew() -> None:
    pure = model_of(blank_spec(), 4)
    reading = pure.spec.reading
    assert isinstance(reading, Blank)
    engine = Engine(pure, max_length=LONG)
    for text in ([1, 2, 3], [1, 2, 3, 4]):
        prompt = [*text, reading.masks[0], reading.sop]
        request = engine.submit(prompt, max_new_tokens=5, stop=())
        run(engine, request)
        assert (request.reused, request.ids) == (0, plain(pure, prompt, 5, stop=()))


# ----------------------------------------------------------------------------- guesses


@few
@given(cases(), choices, st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_every_drafter_gives_the_plain_tokens(
    case: tuple[GLM, list[list[int]]], choice: dict[str, Any], guesses: int, wrong: int, batch: int
) -> None:
    model, prompts = case
    texts = glm.generate(model, prompts, max_new_tokens=9, **choice)
    small = model_of(replace(model.spec, blocks=model.spec.blocks[:1]), 9)
    for draft in (PromptLookup(guesses), SmallerModel(model, guesses), SmallerModel(small, guesses)):
        engine = Engine(model, max_batch=batch, max_length=LONG, draft=draft)
        assert engine.generate(prompts, max_new_tokens=9, **choice) == texts
        assert 0 <= draft.tally.right <= draft.tally.guessed
    alone = Told(texts[:1], guesses, wrong)
    assert Engine(model, max_length=LONG, draft=alone).generate(prompts[:1], max_new_tokens=9, **choice) == texts[:1]


def test_right_guesses_save_steps() -> None:
    pure = model()
    draft = SmallerModel(pure, 3)  # who is always right
    engine = Engine(pure, max_batch=2, max_length=LONG, draft=draft)
    prompts = [[3, 4, 5], [6]]
    assert engine.generate(prompts, max_new_tokens=13, stop=()) == glm.generate(
        pure, prompts, max_new_tokens=13, stop=()
    )
    assert draft.tally.right == draft.tally.guessed == 2 * 9
    assert draft.tally.passes <= 4  # the second prompt is read a step later
    assert glm.generate(pure, prompts, max_new_tokens=13, stop=(), draft=SmallerModel(pure, 3)) == glm.generate(
        pure, prompts, max_new_tokens=13, stop=()
    )


def test_rows_keep_as_many_guesses_as_are_right_in_each() -> None:
    """Not as many as are right in all of them, as `glm.generate` does."""
    pure = model()
    pure.head.weight.data.zero_()  # every answer is 0, 0, 0 …
    draft = PromptLookup(4)
    engine = Engine(pure, max_batch=2, max_length=LONG, draft=draft)
    assert engine.generate([[3, 0, 0], [3, 4, 5]], max_new_tokens=11, stop=()) == [[0] * 11] * 2
    assert draft.tally.passes <= 4


def test_a_smaller_model_of_other_ids_is_refused() -> None:
    engine = Engine(model(), max_length=LONG, draft=SmallerModel(model_of(native_spec(vocabulary=31), 1)))
    request = engine.submit([3, 4], max_new_tokens=4)
    run(engine, request)
    assert request.state == "failed"
    assert isinstance(request.error, GenerationError)
    assert "31 ids and this one 30" in str(request.error)
    with pytest.raises(GenerationError):
        SmallerModel(model(), 0)


# ----------------------------------------------------------------------------- when things go wrong


def spoilt(where: str) -> GLM:
    """A model with a number that is not finite in one of its tensors."""
    pure = model()
    pure.get_parameter(where).data.view(-1)[0] = torch.nan
    return pure


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("blocks.1.mixer.out.weight", "the attention of block 1"),
        ("blocks.0.feed_forward.down.weight", "the feed-forward of block 0"),
        ("blocks.1.wire_mixer.before.weight", "the attention of block 1"),
        ("final_norm.weight", "the final norm or the head"),
        ("head.weight", "the final norm or the head"),
    ],
)
def test_nan_names_the_first_layer(where: str, named: str) -> None:
    engine = Engine(spoilt(where), max_length=LONG)
    with pytest.raises(GenerationError, match=f"prompt 0: the logits of new token 1 are not finite.*{named}"):
        engine.generate([[3, 4]], max_new_tokens=5)
    with pytest.raises(GenerationError, match=named):
        list(engine.stream([3, 4], max_new_tokens=5))
    assert engine.seats.holders == [None]


def test_nan_of_one_request_leaves_the_others_alone() -> None:
    """An id that the others do not say has an embedding that is not finite."""
    pure = model()
    engine = Engine(pure, max_batch=2, max_length=LONG)
    said = {id for prompt in ([3, 4], [5, 6]) for id in plain(pure, prompt, 9, stop=())}
    wrong = min(set(range(7, 30)) - said)
    engine.composed.embedding = engine.composed.embedding.clone()
    engine.composed.embedding[wrong] = torch.inf
    good, bad = (engine.submit(prompt, max_new_tokens=9, stop=()) for prompt in ([3, 4], [wrong, 3]))
    run(engine, good, bad)
    assert (good.state, good.ids) == ("done", plain(pure, [3, 4], 9, stop=()))
    assert bad.state == "failed"
    assert "the embedding" in str(bad.error)
    after = engine.submit([5, 6], max_new_tokens=9, stop=())
    run(engine, after)
    assert after.ids == plain(pure, [5, 6], 9, stop=())
    assert all(buffer.isfinite().all() for layer in engine.slots.buffers for buffer in layer)


def test_nan_while_writing_names_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    pure = model()
    engine = Engine(pure, max_length=LONG)
    request = engine.submit([3, 4], max_new_tokens=9, stop=())
    for _ in range(3):
        engine.step()
    given = list(request.ids)
    engine.composed.blocks[1].mixer.out.operands[0].data[0] = torch.nan  # type: ignore[union-attr]
    run(engine, request)
    assert request.ids == given
    assert f"new token {len(given) + 1} are not finite" in str(request.error)
    assert "the attention of block 1" in str(request.error)


def test_a_failing_prompt_frees_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    pure = model()
    engine = Engine(pure, max_batch=1, max_length=LONG)
    whole = engine.composed.steps

    def no_memory(tokens: Tensor, *rest: Any) -> Any:
        if tokens.shape[1] == 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(tokens, *rest)

    monkeypatch.setattr(engine.composed, "steps", no_memory)
    bad, good = engine.submit([3] * 7, max_new_tokens=4), engine.submit([3, 4], max_new_tokens=4, stop=())
    run(engine, bad, good)
    assert isinstance(bad.error, torch.OutOfMemoryError)
    assert (bad.state, good.state, good.ids) == ("failed", "done", plain(pure, [3, 4], 4, stop=()))
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate([[9] * 7], max_new_tokens=4)


@pytest.mark.parametrize("draft", [False, True])
def test_a_decode_or_a_drafter_that_fails_ends_its_own_request(draft: bool) -> None:
    """The others have the tokens of that step."""
    pure = model()

    class Failing(PromptLookup):
        def start(self, *prompt: Any) -> Any:
            guess, times = super().start(*prompt), iter(range(99))

            def failing(tokens: Tensor, *rest: Any) -> Tensor:
                if prompt[1][0, 0] == 9 and next(times) == 2:
                    raise RuntimeError("no more guesses")
                return guess(tokens, *rest)

            return failing

    def decode(ids: list[int]) -> str:
        if len(ids) > 3 and not draft:
            raise RuntimeError("no text")
        return ""

    engine = Engine(pure, max_batch=3, max_length=LONG, draft=Failing(2) if draft else None)
    how: list[dict[str, Any]] = [{}, {"stop_text": "x", "decode": decode}, {}]
    requests = [
        engine.submit(prompt, max_new_tokens=9, stop=(), **extra)
        for prompt, extra in zip(([3, 4], [9, 8], [5, 6]), how, strict=True)
    ]
    run(engine, *requests)
    assert [request.state for request in requests] == ["done", "failed", "done"]
    assert str(requests[1].error) == ("no more guesses" if draft else "no text")
    for request in (requests[0], requests[2]):
        assert request.ids == plain(pure, request.prompt, 9, stop=())
    assert engine.seats.holders == [None] * 3


def test_short_prompts_are_read_side_by_side() -> None:
    engine = Engine(model(), max_batch=4, max_length=LONG, chunk=6)
    requests = [engine.submit([3 + i, 4, 5], max_new_tokens=9, stop=()) for i in range(4)]
    engine.step()
    assert [request.state for request in requests] == ["writing", "writing", "waiting", "waiting"]
    engine.step()
    assert [len(request.ids) for request in requests] == [3, 3, 2, 2]


def test_a_stream_that_is_dropped_frees_its_slot() -> None:
    engine = Engine(model(), max_length=LONG)
    for _ in range(3):
        tokens = engine.stream([3, 4], max_new_tokens=30, stop=())
        next(tokens)
        assert engine.seats.holders != [None]
        tokens.close()
        assert engine.seats.holders == [None]
    engine.stream([3, 4], max_new_tokens=30, stop=()).close()  # before its first token
    assert not engine.waiting
    request = engine.submit([3], max_new_tokens=30, stop=())
    engine.cancel(request)
    assert (request.state, len(engine.waiting)) == ("cancelled", 0)
    engine.cancel(request)


def test_the_model_is_let_go() -> None:
    pure = model()
    engine = Engine(pure, max_length=LONG, release=True)
    assert all(isinstance(block, nn.Identity) for block in pure.blocks)
    assert engine.generate([[3, 4]], max_new_tokens=9) == glm.generate(model(), [[3, 4]], max_new_tokens=9)


# ----------------------------------------------------------------------------- memory


def generations(engine: Engine, count: int) -> int:
    """Bytes that so many generations, some of them given up, leave behind."""
    process = psutil.Process(os.getpid())
    prompts = [[3 + i % 5, 4, 5 + i % 3] for i in range(15)]

    def some(number: int) -> None:
        for start in range(0, number, 10):
            requests = [engine.submit(prompts[i % 15], max_new_tokens=2, stop=()) for i in range(start, start + 10)]
            engine.step()
            engine.cancel(requests[start // 10 % 10])
            run(engine, *requests)

    some(500)
    gc.collect()
    before = process.memory_info().rss
    objects = len(gc.get_objects())
    some(count)
    gc.collect()
    assert len(gc.get_objects()) < objects + 500
    return process.memory_info().rss - before


def test_a_thousand_generations_leave_nothing() -> None:
    assert generations(Engine(model_of(native_spec(layers=1), 1), max_batch=8, max_length=16), 1000) < 4 << 20


@pytest.mark.slow
def test_ten_thousand_generations_leave_nothing() -> None:
    assert generations(Engine(model_of(native_spec(layers=1), 1), max_batch=8, max_length=16), 10_000) < 4 << 20


# ----------------------------------------------------------------------------- models that somebody changed


class Flat(Attention):
    """Attention in which all that is seen counts alike: a change that no kernel knows."""

    def build(self, width: int, weights: Weights) -> nn.Module:
        return FlatModule(self, width, weights)


class FlatModule(AttentionModule):
    def forward(self, x: Tensor, rotation: Rotation, mask: Mask, memory: Memory) -> Tensor:
        self.qkv.weight.data[: self.spec.heads * self.spec.head_width] = 0
        return super().forward(x, rotation, mask, memory)


def test_a_changed_mixer_is_not_taken_for_the_one_it_was_made_of() -> None:
    spec = native_spec()
    block = replace(spec.blocks[0], mixer=Flat(**vars(spec.blocks[0].mixer)))
    pure = model_of(replace(spec, blocks=(block,) * len(spec.blocks)), 3)
    engine = Engine(pure, max_batch=2, max_length=LONG)
    prompts = [[3, 4, 5, 6, 7], [8, 9]]
    assert engine.generate(prompts, max_new_tokens=9, stop=()) == [plain(pure, p, 9, stop=()) for p in prompts]
    with torch.inference_mode():
        truth = pure(torch.tensor([prompts[0]]))[0]
    assert (engine.read(prompts[0]) - truth).abs().max() <= 1e-10 * truth.square().mean().sqrt()


@dataclass(frozen=True)
class Near(Causal):
    """A token sees itself and the one before."""

    def read(self, ids: Tensor, real: Tensor | None = None) -> Layout:
        layout = super().read(ids, real)
        return Layout(layout.positions, layout.visible & ~layout.visible.tril(-2))


def test_a_reading_rule_with_a_mask_of_its_own_is_refused() -> None:
    engine = Engine(model_of(replace(native_spec(), reading=Near()), 3), max_length=LONG)
    with pytest.raises(LayoutError, match=r"the engine knows the visibility of glm/layout.py only"):
        engine.submit([3, 4, 5], max_new_tokens=2)
    with pytest.raises(LayoutError, match="use the model itself"):
        engine.read([3, 4])
