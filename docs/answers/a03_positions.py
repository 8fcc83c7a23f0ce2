"""What is right in the exercises of chapter 3, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

import glm
from docs.answers import which_field
from docs.check import Case, Exercise
from glm.family.chatglm2 import build
from glm.norms import RMSNorm
from glm.positions import Interpolation, Learned, LearnedModule, Plain, Rotary

BASE = 10000.0


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def learned_places_cases() -> Iterator[Case]:
    """One axis and two, one row and several."""
    for seed, (B, T, axes) in enumerate(((1, 4, 1), (1, 5, 2), (2, 3, 2))):
        module = Learned(length=7, axes=axes).build(width=6).double()
        assert isinstance(module, LearnedModule)
        tables = [random(7, 6, seed=10 * seed + axis) for axis in range(axes)]
        module.load_state_dict({f"tables.{axis}.weight": table for axis, table in enumerate(tables)})
        positions = random(B, T, axes, seed=seed).mul(100).long() % 7
        with torch.no_grad():
            yield Case({"tables": tables, "positions": positions}, {"result": module(positions)})


def half_rotary_cases() -> Iterator[Case]:
    """Small heads and usual ones, in order, with padding, far away."""
    for seed, (K, heads, places) in enumerate(((8, 1, [0, 1, 2, 3]), (64, 2, [0, 0, 0, 1, 2]), (16, 3, [1000, 31999]))):
        positions = torch.tensor([places])
        x = random(1, len(places), heads, K, seed=seed)
        rotary = Rotary((K // 2,), "interleaved", BASE, Plain(), None)
        expected = rotary.rotation(positions[..., None], x.dtype)(x)
        yield Case({"x": x, "positions": positions, "base": BASE}, {"result": expected}, tolerance=1e-11)


def rotary_2d_cases() -> Iterator[Case]:
    """A prompt with the beginning of an answer, and places far apart."""
    rotary = glm.release("chatglm-6b").spec.rotary
    assert isinstance(rotary, Rotary)
    for seed, (K, places) in enumerate(((8, [[0, 0], [1, 0], [1, 1], [1, 2]]), (128, [[2000, 0], [2000, 700]]))):
        positions = torch.tensor([places])
        x = random(1, len(places), 2, K, seed=seed)
        expected = replace(rotary, widths=(K // 2, K // 2)).rotation(positions, x.dtype)(x)
        yield Case({"x": x, "positions": positions, "base": rotary.base}, {"result": expected})


def stretched_cases() -> Iterator[Case]:
    """Both meanings of the field."""
    for release in ("chatglm2-6b-32k", "chatglm3-6b-32k", "glm-4-9b-chat"):
        rotary = glm.release(release).spec.rotary
        assert isinstance(rotary, Rotary)
        [width] = rotary.widths
        divided = isinstance(rotary.scaling, Interpolation)
        ratio = rotary.scaling.factor if isinstance(rotary.scaling, Interpolation) else rotary.base / BASE
        assert divided == (release == "chatglm2-6b-32k")
        arguments = {"release": release, "width": width, "ratio": ratio}
        yield Case(arguments, {"result": rotary.frequencies(width)})


def which_field_cases() -> Iterator[Case]:
    """Each of the fields in turn."""
    norm = RMSNorm(1e-5, weight_first=True)
    spec = build(
        layers=2, width=32, inner=48, heads=4, groups=2, head_width=8, vocabulary=40, context=64, norm=norm,
        base=BASE, scaling=Plain(), pad=None, stop=(2,),
    )  # fmt: skip
    right = glm.GLM(spec, dtype=torch.float64, seed=3)
    with torch.no_grad():
        for name, weight in right.state_dict().items():
            if name.endswith("qkv.weight"):
                weight.mul_(20)  # so that attention is sharp enough to tell one rotation from another
    rotary = spec.rotary
    assert isinstance(rotary, Rotary)
    turned = (
        replace(rotary, pairing="halves"),
        replace(rotary, base=50 * BASE),
        replace(rotary, widths=(8,)),
        replace(rotary, scaling=Interpolation(8.0)),
        replace(rotary, rounding="float16"),
    )
    changes = [replace(spec, rotary=each) for each in turned]
    yield from which_field.cases(right, changes, torch.arange(3, 15)[None])


EXERCISES = [
    Exercise("3.1", "learned_places", cases=learned_places_cases),
    Exercise("3.2", "half_rotary", cases=half_rotary_cases),
    Exercise("3.3", "rotary_2d", cases=rotary_2d_cases),
    Exercise("3.4", "stretched", cases=stretched_cases),
    Exercise("3.5", "which_field", cases=which_field_cases),
]
