"""What is right in the exercises of chapter 1, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

import glm
from docs.check import Case, Exercise
from glm.layout import Layout
from glm.model import GLM
from glm.norms import LayerNorm
from glm.positions import Rotary
from glm.residual import Scaled
from glm.spec import Spec
from glm.tracing import Trace

GOLDENS = Path(glm.__file__).parents[1] / "tests" / "goldens"


@cache
def golden(name: str) -> GLM:
    """A small model of random weights, in float64."""
    return GLM.from_pretrained(GOLDENS / name, dtype=torch.float64)


@cache
def tiny() -> GLM:
    """tiny-glm in float64."""
    return GLM.from_pretrained(glm.embedded(), dtype=torch.float64)


def passes() -> Iterator[Trace]:
    """Causal with few key heads, two rows of which one is padded; read both ways; with a learned prefix."""
    ids = torch.arange(5, 19).view(2, 7)
    real = torch.tensor([[False, False, True, True, True, True, True], [True] * 7])
    model = golden("chatglm3-base")
    yield glm.trace(model, ids, layout=model.layout(ids, real))
    yield glm.trace(tiny(), list(range(300, 309)), layout=Layout.blanks(4, [(2, 3), (0, 2)]))
    yield glm.trace(golden("chatglm3-ptuning-proj"), ids)


def attention_cases() -> Iterator[Case]:
    """Of every kind of mask."""
    for trace in passes():
        name = "block 1 / attention /"
        given = {what: trace[f"{name} {what}"] for what in "qkv"}
        wanted = {what: trace[f"{name} {what}"] for what in ("scores", "probabilities", "heads")}
        yield Case({**given, "visible": trace["visible"]}, wanted)


def contribution_cases() -> Iterator[Case]:
    """Two generations with pre-norms."""
    for name in ("chatglm3-base", "hf_glm4_moe-air"):
        trace = glm.trace(golden(name), torch.arange(5, 19).view(2, 7))
        parts = [trace["stream"]]
        for i in range(len(trace.model.blocks)):
            parts += [trace[f"block {i} / {sublayer} / output"] for sublayer in ("attention", "feed-forward")]
        assert torch.allclose(sum(parts[1:], parts[0]), trace.streams[-1], rtol=1e-12, atol=1e-12)
        yield Case({"trace": trace}, {"result": torch.stack(parts)})


def lens_cases() -> Iterator[Case]:
    """After every block of tiny-glm; the order of the vocabulary is the model's."""
    trace = glm.trace(tiny(), list(range(300, 309)))
    count = tiny().spec.vocabulary
    lens = trace.lens(count)
    for stream, ids, probabilities in zip(trace.streams, *lens, strict=True):
        yield Case(
            {"model": tiny(), "stream": stream},
            {"result": torch.zeros_like(probabilities).scatter(-1, ids, probabilities)},
        )


def changed() -> Iterator[tuple[str, Spec]]:
    """tiny-glm's spec with one field changed, and the name of the field."""
    spec = tiny().spec
    block = spec.blocks[0]
    assert isinstance(spec.rotary, Rotary)
    assert isinstance(block.wiring, Scaled)
    assert isinstance(block.norm, LayerNorm)
    assert isinstance(spec.final_norm, LayerNorm)
    yield "rotary.base", replace(spec, rotary=replace(spec.rotary, base=20000.0))
    yield "rotary.pairing", replace(spec, rotary=replace(spec.rotary, pairing="interleaved"))
    for name, other in (
        ("norm.eps", replace(block, norm=replace(block.norm, eps=1e-6))),
        ("wiring.alpha", replace(block, wiring=Scaled(7.0))),
        ("feed_forward.branches", replace(block, feed_forward=replace(block.feed_forward, branches=("gelu",)))),
    ):
        yield name, replace(spec, blocks=(other,) * len(spec.blocks))
    yield "final_norm.eps", replace(spec, final_norm=replace(spec.final_norm, eps=1e-6))


@cache
def broken_passes() -> list[tuple[str, Trace, Trace]]:
    """A field, a pass of tiny-glm, and the same with that field changed."""
    ids = list(range(300, 309))
    sound = glm.trace(tiny(), ids)
    found = []
    for name, spec in changed():
        model = GLM(spec, dtype=torch.float64)
        model.load_state_dict(tiny().state_dict())
        found.append((name, sound, glm.trace(model, ids)))
    return found


def poisoned(where: str) -> GLM:
    """tiny-glm with a number that is none in the weights of the module `where`."""
    model = GLM(tiny().spec, dtype=torch.float64)
    model.load_state_dict(tiny().state_dict())
    weight = model.get_submodule(where).weight
    assert isinstance(weight, torch.Tensor)
    with torch.no_grad():
        weight[3] = torch.nan
    return model


def difference_cases() -> Iterator[Case]:
    """Each broken field; a pass and itself; and two whose numbers are not all finite."""
    ids = list(range(300, 309))
    sick = glm.trace(poisoned("blocks.1.feed_forward.up"), ids)
    sicker = glm.trace(poisoned("blocks.1.mixer.qkv"), ids)
    pairs = [(sound, broken) for _, sound, broken in broken_passes()]
    pairs += [(pairs[0][0], pairs[0][0]), (sick, sick), (sick, sicker)]
    for one, other in pairs:
        names = (name for name in one if not torch.equal(one[name].nan_to_num(1e99), other[name].nan_to_num(1e99)))
        yield Case({"one": one, "other": other}, {"result": next(names, None)})


def field_cases() -> Iterator[Case]:
    """One for each field."""
    for name, sound, broken in broken_passes():
        yield Case({"sound": sound, "broken": broken}, {"result": name})


EXERCISES = [
    Exercise("1.1", "attend", attention_cases),
    Exercise("1.2", "contributions", contribution_cases),
    Exercise("1.3", "lens", lens_cases),
    Exercise("1.4", "first_difference", difference_cases),
    Exercise("1.5", "broken_field", field_cases),
]
