"""What is right in the exercises of chapter 8, by `glm` itself."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import glm
from docs.check import Case, Exercise
from glm.latent_attention import LatentAttention, LatentAttentionModule
from glm.layout import Layout, Mask
from glm.linear import Dense
from glm.norms import RMSNorm
from glm.positions import Plain, Rotary

SMALL = LatentAttention(4, None, 10, 6, 4, 5, RMSNorm(1e-6, weight_first=False), bias=False)
WIDE = replace(SMALL, heads=8, rank=6, plain=20, rotary=2, value=24)


def drawn(spec: LatentAttention, width: int, seed: int) -> LatentAttentionModule:
    """A layer with the same weights each time, float64."""
    module = LatentAttentionModule(spec, width, Dense()).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for weight in module.parameters():
        weight.normal_(generator=generator)
    return module


def remembered_cases() -> Iterator[Case]:
    """From the beginning of a text, and from far inside it; with an eps that counts."""
    for seed, (start, eps) in enumerate(((0, 1e-6), (500, 1.0))):
        spec = replace(SMALL, norm=RMSNorm(eps, weight_first=False))
        module, T = drawn(spec, 12, seed), 5
        x = torch.randn(T, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rotary = Rotary((spec.rotary,), "interleaved", 1e4, Plain(), None)
        rotation = rotary.rotation(torch.arange(start, start + T)[None, :, None], x.dtype)
        arguments = {
            "x": x,
            "down": module.down.weight,
            "weight": module.norm.weight,
            "eps": eps,
            "rotary": spec.rotary,
            "turn": lambda v, rotation=rotation: rotation(v[None, :, None])[0, :, 0],
        }
        yield Case(arguments, {"result": module.latent(x[None], rotation)[0, 0]})


def mask(T: int, S: int) -> Mask:
    """Causal, for the newest T of S tokens."""
    return Layout.rule(torch.arange(S - T, S)[None, :, None], S).mask()


def attention_case(spec: LatentAttention, T: int, S: int, seed: int) -> tuple[dict[str, Any], Tensor]:
    """Arguments of both forms, and what the heads find."""
    module, generator = drawn(spec, 12, seed), torch.Generator().manual_seed(seed)
    q = torch.randn(spec.heads, T, spec.plain + spec.rotary, generator=generator, dtype=torch.float64)
    cache = torch.randn(S, spec.rank + spec.rotary, generator=generator, dtype=torch.float64)
    up = module.up.get_parameter("weight").view(spec.heads, -1, spec.rank)
    found = module.attend_naive(q[None], cache[None, None], mask(T, S))[0]
    return {"q": q, "cache": cache, "up": up, "rank": spec.rank}, found


def naive_cases() -> Iterator[Case]:
    """A prompt, a step, and a piece of a prompt."""
    for seed, (spec, T, S) in enumerate(((SMALL, 6, 6), (SMALL, 1, 9), (WIDE, 3, 8))):
        arguments, found = attention_case(spec, T, S, seed)
        yield Case(arguments, {"result": found}, tolerance=1e-11)


def absorbed_cases() -> Iterator[Case]:
    """The same, and what is found of the latents: by heads whose values are the latents."""
    for seed, (spec, T, S) in enumerate(((SMALL, 6, 6), (SMALL, 1, 9), (WIDE, 3, 8))):
        arguments, result = attention_case(spec, T, S, seed)
        module, keys = drawn(replace(spec, value=spec.rank), 12, seed), arguments["up"][:, : spec.plain]
        latents = torch.eye(spec.rank, dtype=torch.float64).expand(spec.heads, -1, -1)
        module.up.get_parameter("weight").copy_(torch.cat((keys, latents), dim=1).flatten(0, 1))
        found = module.attend_naive(arguments["q"][None], arguments["cache"][None, None], mask(T, S))[0]
        yield Case(arguments, {"found": found, "result": result}, tolerance=1e-11)


def break_even_cases() -> Iterator[Case]:
    """The published layer, a small one, and one whose latent is longer than its heads."""
    published = glm.release("glm-4.7-flash").spec.blocks[0].mixer
    for mixer in (published, SMALL, WIDE):
        for keys in (1, 100, 4096):
            cheaper = [T for T in range(1, keys + 1) if mixer.absorbing_is_cheaper(T, keys)]
            yield Case({"mixer": mixer, "keys": keys}, {"result": max(cheaper, default=0)})


EXERCISES = [
    Exercise("8.1", "remembered", remembered_cases),
    Exercise("8.2", "naive", naive_cases),
    Exercise("8.3", "absorbed", absorbed_cases),
    Exercise("8.4", "break_even", break_even_cases),
]
