"""What is right in the exercises of chapter 11, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.checkpoint import PerHead
from glm.family.chatglm2 import build
from glm.grouped import Grouped, dequantize
from glm.linear import scaled
from glm.norms import RMSNorm
from glm.packing import pack
from glm.parts import Cut
from glm.positions import Plain, Rotary
from glm.quantized_files import LAYOUTS, Scheme, read
from glm.tensor_file import read_header


def random(*shape: int, seed: int) -> Tensor:
    """The same numbers each time, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(low: int, high: int, *shape: int, seed: int) -> Tensor:
    """The same int8 numbers each time, low to high - 1."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def flat_cases() -> Iterator[Case]:
    """A weight and a bias."""
    for seed, (heads, width, shape) in enumerate(((4, 2, (6,)), (3, 5, ()))):
        ours = random(3 * heads * width, *shape, seed=seed)
        yield Case({"rows": PerHead(heads).on_disk(ours).flatten(0, 2), "heads": heads}, {"result": ours})


def merged_cases() -> Iterator[Case]:
    """First and second matrices, gated ones, biases, and a single part."""
    for seed, (axis, gated, ranks, shape) in enumerate(
        ((0, False, 2, (8, 3)), (1, False, 4, (3, 8)), (0, True, 2, (8, 3)), (0, True, 4, (16,)), (0, True, 1, (4, 2)))
    ):
        whole = random(*shape, seed=seed)
        parts = Cut("", axis, blocks=2 if gated else 1).split(whole, ranks)
        yield Case({"parts": parts, "axis": axis, "gated": gated}, {"result": whole})


def dequantised_cases() -> Iterator[Case]:
    """All bytes there are, and some."""
    every = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(2, 128)
    for seed, weight in enumerate((every, integers(-128, 128, 5, 3, seed=1))):
        scale = random(len(weight), seed=seed).abs()
        yield Case({"weight": weight, "scale": scale}, {"result": scaled(weight, scale, 4, scale.dtype)})


def from_gptq_cases() -> Iterator[Case]:
    """Both versions, one group and several."""
    for seed, (version, groups) in enumerate(((2, 1), (1, 1), (1, 4), (2, 2))):
        inputs, outputs = 32, 16
        scales = random(groups, outputs, seed=seed).abs().half()
        tensors = {
            "m.qweight": pack(integers(-8, 8, outputs, inputs, seed=seed), 4).T.contiguous(),
            "m.qzeros": pack(integers(-8, 8, groups, outputs, seed=seed + 9), 4),
            "m.scales": scales,
        }
        form = Grouped(4, inputs // groups, symmetric=False)
        layout = {1: "gptq", 2: "gptq_v2"}[version]
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.safetensors"
            save_file(tensors, path)
            ours = LAYOUTS[layout][1](read_header(path), "m", Scheme(form, layout, ignore=()))
            packed, scale, zeros = (read(name, info) for name, info in ours.items())
        arguments = {name.removeprefix("m."): x for name, x in tensors.items()}
        arguments["scales"] = scales.double()
        expected = dequantize(packed, scale.double(), zeros, form)
        yield Case(arguments | {"version": version}, {"result": expected})


def which_mistake_cases() -> Iterator[Case]:
    """Each of them."""
    spec = build(
        layers=2, width=16, inner=24, heads=4, groups=4, head_width=8, vocabulary=30, context=64,
        norm=RMSNorm(1e-5, weight_first=True), base=1e4, scaling=Plain(), pad=None, stop=(),
    )  # fmt: skip
    right = glm.GLM(spec, dtype=torch.float64).requires_grad_(False)
    for seed, x in enumerate(right.parameters()):
        x.copy_(random(*x.shape, seed=seed) / x.shape[-1] ** 0.5)
    assert isinstance(spec.rotary, Rotary)

    def converted(name: str, x: Tensor, mistake: str) -> Tensor:
        state: dict[str, Tensor] = right.state_dict()
        if mistake == "q k v" and ".qkv." in name:
            return PerHead(4).on_disk(x).flatten(0, 2)
        if mistake == "gate up" and "feed_forward.up" in name:
            return torch.cat(x.chunk(2)[::-1])
        if mistake == "norms" and "wire_mixer" in name:
            return state[name.replace("wire_mixer", "wire_feed_forward")]
        if mistake == "norms" and "wire_feed_forward" in name:
            return state[name.replace("wire_feed_forward", "wire_mixer")]
        return state["embedding.weight"] if mistake == "head" and name == "head.weight" else x

    for mistake in ("q k v", "gate up", "norms", "head", "rotary"):
        other = replace(spec, rotary=replace(spec.rotary, base=5e6)) if mistake == "rotary" else spec
        wrong = glm.GLM(other, dtype=torch.float64).requires_grad_(False)
        wrong.load_state_dict({name: converted(name, x, mistake) for name, x in right.state_dict().items()})
        ids = torch.arange(3, 20)[None]
        assert (right(ids) - wrong(ids)).abs().max() > 1e-9
        yield Case({"right": right, "wrong": wrong}, {"result": mistake})


EXERCISES = [
    Exercise("11.1", "flat", flat_cases),
    Exercise("11.2", "merged", merged_cases),
    Exercise("11.3", "dequantised", dequantised_cases),
    Exercise("11.4", "from_gptq", from_gptq_cases),
    Exercise("11.5", "which_mistake", which_mistake_cases),
]
