"""Faults put into the engine on purpose: each must change tokens or logits, or leave something behind.

A fault is a line of the engine with another in its place; it is held to what the other tests hold the engine to, on a
few small models. Those that nothing here could see are not in the list.
"""

import importlib
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from test_drafting import Told
from test_generation import blank_spec, model_of, native_spec, sandwich_spec
from two_processes import TOYS, made
from two_processes import prompts as toy_prompts

import glm
from glm import Engine, PromptLookup
from glm.errors import GenerationError
from glm.layout import Blank

FAULTS = [
    # module, who, right, wrong
    ("decoding", "read", "[:, None] * rows.steps", "[:, None] * 0 * rows.steps"),
    ("decoding", "advance", "composed.logits(stream), rows.tokens", "composed.logits(stream), rows.tokens + 1"),
    ("glm_kernels.acceptance", "accept_reference", "cumprod(1).sum(1)", "sum(1)"),
    ("glm_kernels.acceptance", "accept_reference", "ids[:, :-1] == tokens[:, 1:]", "ids[:, :-1] >= 0 * tokens[:, 1:]"),
    ("glm_kernels.acceptance", "accept_reference", "(length, at, count)", "(length, count)"),
    ("glm_kernels.acceptance", "accept_reference", "(length, at, count)", "(at, count)"),
    ("glm_kernels.acceptance", "accept_reference", "(length, at, count)", "(length, at)"),
    ("glm_kernels.acceptance", "accept_reference", "kept[:, None] * steps", "steps"),
    ("glm_kernels.acceptance", "accept_reference", "right[:, None])", "0 * right[:, None])"),
    ("glm_kernels.acceptance", "accept_reference", "1 + right, 0)", "1 + right, 1)"),
    ("glm_kernels.acceptance", "accept_reference", "seen[row, ids[row, i]] = True", "pass"),
    ("glm_kernels.acceptance", "accept_reference", ">= kept[:, None]", "> kept[:, None]"),
    ("glm_kernels.choice", "likeliest_reference", "x.argmax(-1), -1", "x.argmax(-1), 0"),
    ("glm_kernels.choice", "likeliest_reference", "x.argmax(-1)", "x.argmin(-1)"),
    ("sampling", "chosen", "count + i", "count"),
    ("sampling", "chosen", "if i > 0", "if i > 9"),
    ("sampling", "chosen", 'sort=choice == "nucleus"', "sort=False"),
    ("sampling", "choice_of", "s.repetition_penalty == 1", "True"),
    ("sampling", "choice_of", "s.top_k > 0 or", "False or"),
    ("sampling", "choice_of", "or s.top_p < 1", ""),
    ("sampling", "sampled", "cold | (best < 0), best, sample", "~cold | (best < 0), best, sample"),
    ("sampling", "sampled", "x > 0, x / penalty, x * penalty", "x > 0, x * penalty, x / penalty"),
    ("sampling", "nucleus", "likelier >= p", "likelier > 2 * p"),
    ("sampling", "nucleus", "k[:, None] - 1", "k[:, None] * 0"),
    ("call", "Turns.found", "return cos, sin", "return sin, cos"),
    ("call", "Call.mask", "j <= last", "j < last"),
    ("slots", "append", "at[:, None].long() +", "0 * at[:, None].long() +"),
    ("slots", "Slots.clear", "buffer[rows, :, : self.before] = self.prefix[i][j]", "pass"),
    ("seats", "common", "len(prompt) - 1, len(text)", "len(prompt) - 1, len(text) + 1"),
    ("seats", "common", "prompt[i] != text[i]", "prompt[i] > text[i]"),
    ("rows", "Rows.rest", "self.at[row] = self.nowhere", "pass"),
    ("rows", "Rows.rest", "self.length", "self.count"),
    ("rows", "Rows.begin", "rules.seen[row] = False", "pass"),
    ("rows", "Rows.go_on", "self.at[row] = token, 1, at", "self.at[row] = token, 2, at"),
    ("rows", "Rows.go_on", "step.to", "0 * step.to"),
    ("rows", "Rows.go_on", "at + self.tokens.shape[1]", "at + self.tokens.shape[1] + 1"),
    ("wiring", "scaled", "alpha * h", "h"),
    ("wiring", "wire", "x + outer(f(x, norm=inner, residual=None))", "outer(f(x, norm=inner, residual=x))"),
    ("attention", "FusedAttention.normed", "self.norms[1](k)", "self.norms[0](k)"),
    ("attention", "FusedLatentAttention.answer", "self.spec.plain + self.spec.rotary", "self.spec.plain"),
    ("attention", "FusedLatentAttention.__call__", "norm=self.query_norm", "norm=None"),
    ("attention", "AsItIs.__call__", "y if residual is None else y + residual", "y"),
    ("feed_forward", "FusedExperts.__call__", "offsets, swiglu=self.swiglu)", "offsets)"),
    ("feed_forward", "FusedExperts.__call__", "index_copy_(0, order, y)", "copy_(y)"),
    ("feed_forward", "FusedExperts.__call__", "residual=added", "residual=None"),
    ("matrices", "fitting", "inputs % group == 0", "inputs % group != 1"),
    ("engine", "Engine.excerpt", "before + end, prefix", "before + end, None"),
    ("engine", "Engine.excerpt", "before + n]", "n]"),
    ("engine", "Engine.piece", "max(start + self.chunk, request.prefix)", "start + self.chunk"),
    ("engine", "Engine.begin", "self.slots.before + length", "length"),
    ("engine", "Engine.begin", "request.positions(length, 1)", "request.positions(length - 1, 1)"),
    ("engine", "Engine.launch", "while rows <= max(writers)", "while rows < max(writers)"),
    ("engine", "Engine.launch", "for request in writers.values()", "for request in [writers[min(writers)]]"),
    ("engine", "Engine.leave", "self.rows.rest(slot)", "pass"),
    ("engine", "Engine.leave", 'if state == "failed"', 'if state == "done"'),
    ("engine", "Engine.settle", 'if request.state != "writing":', "if False:"),
    ("engine", "Engine.give", "len(row.ids) + 1 == request.max_new_tokens", "len(row.ids) == request.max_new_tokens"),
    ("requests", "Request.positions", "- len(self.prompt) + 1", "- len(self.prompt)"),
]  # fmt: skip


def holds() -> None:
    """What must be so, as briefly as the faults allow."""
    for spec, seed in ((native_spec(), 3), (sandwich_spec(), 1), (blank_spec(), 4)):
        pure = model_of(spec, seed)
        prompts = [[3, 4, 5, 6, 7], [6], [7, 8, 9], [3, 4, 5, 1]]
        if isinstance(spec.reading, Blank):
            prompts = [[*prompt, spec.reading.masks[0], spec.reading.sop] for prompt in prompts]
        for how in (
            {},
            {"temperature": 1.5, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.4, "seed": 2},
        ):
            truth = glm.generate(pure, prompts, max_new_tokens=8, stop=(), **how)
            for ahead, draft in ((0, None), (1, None), (0, Told(truth[:1], 3, 2))):
                some = prompts if draft is None else prompts[:1]
                engine = Engine(pure, max_batch=3, max_length=40, chunk=2, draft=draft)
                engine.ahead = ahead if draft is None else 0
                for _ in range(1 if draft else 2):
                    assert engine.generate(some, max_new_tokens=8, stop=(), **how) == truth[: len(some)]
                assert engine.seats.holders == [None] * 3
                assert not engine.rows.busy.any()
                assert bool((engine.rows.at == engine.slots.nowhere).all())
            mixed = Engine(pure, max_batch=2, max_length=40)
            one = mixed.submit(prompts[0], max_new_tokens=8, stop=())
            two = mixed.submit(prompts[0], max_new_tokens=8, stop=(), **how)
            while one.active or two.active:
                mixed.step()
            assert one.ids == glm.generate(pure, prompts[:1], max_new_tokens=8, stop=())[0]
            assert two.ids == truth[0]
        truths = glm.generate(pure, prompts, max_new_tokens=8, stop=())
        lookup = Engine(pure, max_batch=2, max_length=40, draft=PromptLookup(2))
        assert lookup.generate(prompts, max_new_tokens=8, stop=()) == truths
        gone = Engine(pure, max_batch=2, max_length=40)
        gone.ahead = 1
        left = gone.submit(prompts[0], max_new_tokens=8, stop=())
        while len(left.ids) < 3:
            gone.step()
        gone.cancel(left)
        after = [gone.submit(prompt, max_new_tokens=8, stop=()) for prompt in (prompts[1], prompts[2])]
        while any(request.active for request in after):
            gone.step()
        assert (left.state, left.ids) == ("cancelled", truths[0][:3])
        assert [request.ids for request in after] == truths[1:3]
    pure, prompt = model_of(native_spec(), 3), [3, 4, 5, 6, 7]
    for how in (
        {"repetition_penalty": 3.0},
        {"temperature": 1.5, "top_k": 3, "seed": 2},
        {"temperature": 1.5, "top_p": 0.5, "seed": 2},
    ):
        truth = glm.generate(pure, [prompt], max_new_tokens=16, stop=(), **how)
        for draft in (None, Told(truth, 3, 2)):
            engine = Engine(pure, max_length=40, draft=draft)
            assert engine.generate([prompt], max_new_tokens=16, stop=(), **how) == truth
    for name in ("chatglm2, prefix", "experts", "latent", "sparse"):
        pure = made(TOYS[name])
        prompts = toy_prompts(pure.spec)
        engine = Engine(pure, max_batch=2, max_length=40, chunk=4)
        for how in ({}, {"temperature": 2.0, "seed": 3}):
            new = engine.generate(prompts, max_new_tokens=12, stop=(), **how)
            assert new == glm.generate(pure, prompts, max_new_tokens=12, stop=(), **how)
        with torch.inference_mode():
            truth_logits = pure(torch.tensor(prompts[:1]))[0]
            assert (engine.read(prompts[0]) - truth_logits).abs().max() < 1e-10 * truth_logits.abs().max()
    integers = Engine(model_of(TOYS["sandwich"], 1), max_length=16, weights="int8")
    assert integers.composed.blocks[0].mixer.qkv.named["group"] == 24  # type: ignore[union-attr]
    broken = model_of(TOYS["chatglm2, prefix"], 1)
    engine = Engine(broken, max_length=16)
    engine.composed.embedding = engine.composed.embedding.detach().clone()
    engine.composed.embedding[5] = torch.nan
    with pytest.raises(GenerationError, match="the embedding"):
        engine.generate([[3, 5]], max_new_tokens=3, stop=())
    assert all(buffer.isfinite().all() for layer in engine.slots.buffers for buffer in layer)
    assert 5 not in (new := glm.generate(broken, [[3, 4]], max_new_tokens=3, stop=())[0])
    assert engine.generate([[3, 4]], max_new_tokens=3, stop=()) == [new]
    spoilt = Engine(broken, max_length=16)
    waiting = spoilt.submit([3, 4], max_new_tokens=9, stop=())
    spoilt.step()
    spoilt.composed.embedding = torch.full_like(spoilt.composed.embedding, torch.nan)
    while waiting.active:
        spoilt.step()
    assert waiting.state == "failed"


def test_without_a_fault() -> None:
    holds()


@pytest.fixture
def put(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str, str], None]:
    """Puts a fault in: (module, function or Class.method, right, wrong)."""

    def fault(name: str, who: str, right: str, wrong: str) -> None:
        module: ModuleType = importlib.import_module(name if "." in name else f"glm.runtime.{name}")
        owner: Any = module
        *path, last = who.split(".")
        for part in path:
            owner = getattr(owner, part)
        whole = inspect.getattr_static(owner, last)
        function = inspect.unwrap(whole.__func__ if isinstance(whole, classmethod | staticmethod) else whole)
        source = textwrap.dedent(inspect.getsource(function))
        assert right in source, f"{right!r} does not stand in {who}"
        place: dict[str, Any] = {}
        exec(compile(source.replace(right, wrong), "<fault>", "exec"), module.__dict__, place)
        changed = place[last]
        monkeypatch.setattr(owner, last, changed)
        users = (
            "engine",
            "decoding",
            "sampling",
            "attention",
            "feed_forward",
            "matrices",
            "composed",
            "seats",
            "wiring",
        )
        for other in users:
            user = importlib.import_module(f"glm.runtime.{other}")
            if not path and getattr(user, last, None) is whole:
                monkeypatch.setattr(user, last, changed)

    return fault


@pytest.mark.parametrize(("name", "who", "right", "wrong"), FAULTS)
def test_a_fault_is_seen(
    name: str, who: str, right: str, wrong: str, put: Callable[[str, str, str, str], None]
) -> None:
    put(name, who, right, wrong)
    with pytest.raises((Exception, pytest.fail.Exception)):  # whatever shows, also that nothing is raised
        holds()
