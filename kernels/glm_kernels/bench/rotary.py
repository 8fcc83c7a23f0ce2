"""Rotary positions: queries and keys turned, and turned and put into the cache.

Bytes of N tokens: the (H + G) K channels of queries and keys read and written, cos and sin in float32, 4 bytes of
either for half of the Σw channels that turn; with the append also the G K channels of the values, and in int8 a scale
of 4 bytes for every head written. Flops, 6 a pair, bound nothing. The roof is R, which only reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from glm_kernels.bench import cases as published
from glm_kernels.bench.norms import ROWS
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator, sample

HELD = 3  # tokens in the cache before


@dataclass(frozen=True, kw_only=True)
class RotaryCase(Case):
    """B sequences of T tokens.

    widths, pairing   as `rotary` takes them
    append            "" (turn queries and keys), or the dtype of the cache that keys and values are put into
    """

    heads: int
    groups: int
    key: int
    widths: tuple[int, ...]
    pairing: str
    batch: int
    tokens: int
    append: str = ""


def case(model: published.Model, rows: int, importance: int, append: str = "") -> RotaryCase:
    """A case in the shape of `model`: many rows are one sequence, few are new tokens of as many sequences."""
    groups, key = (1, sum(model.rotary[1])) if model.latent else (model.groups, model.key)
    batch, tokens = (rows, 1) if rows <= max(published.BATCHES) else (1, rows)
    return RotaryCase(
        model=model.name, dtype=model.dtype, heads=model.heads, groups=groups, key=key, widths=model.rotary[1],
        pairing=model.rotary[0], batch=batch, tokens=tokens, append=append, importance=importance,
    )  # fmt: skip


def all_cases() -> list[RotaryCase]:
    """Every model's rotation; with the cache, but for the latent one."""

    def everything() -> Iterator[RotaryCase]:
        for model in (*published.NAMED, published.GLM_130B):
            for rows in ROWS:
                first = model in (published.GLM_4_9B, published.CHATGLM_6B) and rows in (1, 4096)
                yield case(model, rows, 2)
                if not model.latent:
                    yield case(model, rows, 0 if first else 2, model.dtype)
                if model is published.GLM_4_9B:
                    yield case(model, rows, 3, "int8")

    return list(everything())


def make_inputs(case: RotaryCase, device: torch.device, seed: int) -> Inputs:
    """qkv, cos and sin."""
    random = generator(device, seed)
    count = case.heads + (2 if case.append else 1) * case.groups
    angles = torch.rand(case.batch, case.tokens, sum(case.widths) // 2, generator=random, device=device) * 6.28
    shape = case.batch, case.tokens, count * case.key
    qkv = torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)
    inputs = {"qkv": qkv, "cos": angles.cos(), "sin": angles.sin()}
    if case.append:
        inputs["at"] = torch.full((case.batch,), HELD, dtype=torch.int32, device=device)
    return inputs


def written(case: RotaryCase) -> float:
    """Bytes of queries, and of keys and values: turned, or in the cache."""
    tokens, size = case.batch * case.tokens, case.torch_dtype.itemsize
    head = case.key + 4 if case.append == "int8" else case.key * size
    return tokens * (case.heads * case.key * size + (2 if case.append else 1) * case.groups * head)


def work(case: RotaryCase) -> Work:
    """See the head of this file."""
    tokens, count = case.batch * case.tokens, case.heads + (2 if case.append else 1) * case.groups
    read = tokens * (count * case.key * case.torch_dtype.itemsize + 4 * sum(case.widths))
    return Work(read + written(case), 3 * tokens * (case.heads + case.groups) * sum(case.widths))


def outputs(case: RotaryCase) -> float:
    """Bytes of what is written, cache and all."""
    slots = 2 * case.batch * HELD * case.groups * case.key * case.torch_dtype.itemsize if case.append else 0
    return written(case) + slots


# ----------------------------------------------------------------------------- the equation in plain torch


def turn(x: Tensor, cos: Tensor, sin: Tensor, widths: tuple[int, ...], pairing: str) -> Tensor:
    """[B, T, heads, K] turned, in float32, or float64 if x is, and rounded to the dtype of x."""
    wide = x if x.dtype == torch.float64 else x.float()
    parts, first = [], 0
    for width in widths:
        part = wide[..., first : first + width]
        c, s = (table[..., None, first // 2 : (first + width) // 2] for table in (cos, sin))
        if pairing == "interleaved":
            a, b = part[..., ::2], part[..., 1::2]
            parts.append(torch.stack([a * c - b * s, a * s + b * c], -1).flatten(-2))
        else:
            a, b = part.chunk(2, -1)
            parts.append(torch.cat([a * c - b * s, a * s + b * c], -1))
        first += width
    return torch.cat([*parts, wide[..., first:]], -1).to(x.dtype)


def heads_of(case: RotaryCase, x: Tensor) -> tuple[Tensor, Tensor]:
    """qkv -> queries and keys [B, T, H + G, K] and values [B, T, G, K] (none without append)."""
    every = x.unflatten(-1, (-1, case.key))
    both = case.heads + case.groups
    return every[:, :, :both], every[:, :, both:]


def caches(case: RotaryCase, device: torch.device) -> dict[str, Tensor]:
    """Empty ones, of NaN where that can be: a side that writes nothing must not find what another wrote."""
    shape = case.batch, case.groups, HELD + case.tokens
    if case.append == "int8":
        kept = {name: torch.zeros(*shape, case.key, device=device, dtype=torch.int8) for name in ("k", "v")}
        return kept | {name: torch.full(shape, torch.nan, device=device) for name in ("key_scale", "value_scale")}
    return {
        name: torch.full((*shape, case.key), torch.nan, device=device, dtype=case.torch_dtype) for name in ("k", "v")
    }


def put(cache: Tensor, new: Tensor) -> None:
    """Write [B, T, G, K] behind the tokens held."""
    cache[:, :, HELD:] = new.transpose(1, 2)


def plain(case: RotaryCase, qkv: Tensor, cos: Tensor, sin: Tensor, kept: dict[str, Tensor]) -> Any:
    """Turned queries and keys, or with append (queries, caches)."""
    both, values = heads_of(case, qkv)
    turned = turn(both, cos, sin, case.widths, case.pairing)
    if not case.append:
        return turned
    queries, keys = turned.split([case.heads, case.groups], 2)
    for name, new in (("k", keys), ("v", values)):
        scale = kept.get({"k": "key_scale", "v": "value_scale"}[name])
        if scale is not None:
            largest = new.float().abs().amax(-1) / 127
            put(scale[..., None], largest[..., None])
            new = (new.float() / largest.clamp(min=1e-30)[..., None]).round().to(torch.int8)
        put(kept[name], new)
    return queries, kept


# ----------------------------------------------------------------------------- the sides


def ours(case: RotaryCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    qkv, form = inputs["qkv"], {"widths": case.widths, "pairing": case.pairing}
    if not case.append:
        rotary = find(f"{OURS}", "rotary")
        return partial(rotary, heads_of(case, qkv)[0], inputs["cos"], inputs["sin"], **form)
    append, kept = find(OURS, "rotary_append"), caches(case, qkv.device)
    scales = {name: kept[name] for name in ("key_scale", "value_scale") if name in kept}

    def call() -> Any:
        queries = append(qkv, inputs["cos"], inputs["sin"], kept["k"], kept["v"], inputs["at"], **form, **scales)
        return queries, kept

    return call


def torch_rotary(case: RotaryCase, inputs: Inputs, compile: bool) -> Call:
    """Plain torch, as it is or compiled. (It knows where the cache ends; ours reads that on the device.)"""
    kept = caches(case, inputs["qkv"].device) if case.append else {}
    if compile:
        on_gpu(inputs["qkv"], "torch.compile")
    function = compiled(plain) if compile else plain
    return partial(function, case, inputs["qkv"], inputs["cos"], inputs["sin"], kept)


def liger(case: RotaryCase, inputs: Inputs) -> Call:
    """Liger's kernel, which turns whole heads in halves, in place: on copies of its own."""
    apply = find("liger_kernel.ops.rope", "LigerRopeFunction.apply")
    on_gpu(inputs["qkv"], "liger")
    if case.append or case.pairing != "halves" or case.widths != (case.key,):
        raise MissingError("turns whole heads in halves only")
    both = heads_of(case, inputs["qkv"])[0].transpose(1, 2)
    q, k = (x.contiguous() for x in both.split([case.heads, case.groups], 1))
    cos, sin = (inputs[name].repeat(1, 1, 2).to(q.dtype) for name in ("cos", "sin"))
    return lambda: torch.cat([x.transpose(1, 2) for x in apply(q, k, cos, sin)], 2)


def flashinfer(case: RotaryCase, inputs: Inputs) -> Call:
    """flashinfer's kernel for one axis, from a table of cos and sin."""
    apply = find("flashinfer.rope", "apply_rope_with_cos_sin_cache")
    on_gpu(inputs["qkv"], "flashinfer")
    if case.append or len(case.widths) > 1:
        raise MissingError("has one axis, and no append to such a cache")
    both = heads_of(case, inputs["qkv"])[0].flatten(0, 1)
    q, k = (x.flatten(1).contiguous() for x in both.split([case.heads, case.groups], 1))
    table = torch.cat([inputs["cos"], inputs["sin"]], -1).flatten(0, 1)
    positions = torch.arange(len(table), device=q.device)
    halves = case.pairing == "halves"
    return partial(apply, positions, q, k, case.key, table, halves)


def sides(case: RotaryCase) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("torch", partial(torch_rotary, case, compile=False)),
        Side("torch.compile", partial(torch_rotary, case, compile=True)),
        Side("liger", partial(liger, case), steady=False),
        Side("flashinfer", partial(flashinfer, case)),
    ]


# ----------------------------------------------------------------------------- what is right


def expected(case: RotaryCase, inputs: Inputs) -> list[Expected]:
    """Some tokens of queries and keys, and what stands in the cache for them."""
    tokens = sample(case.tokens, 512).to(inputs["qkv"].device)
    qkv, cos, sin = (inputs[name][:, tokens] for name in ("qkv", "cos", "sin"))
    both, values = heads_of(case, qkv)
    exact = turn(both.double(), cos.double(), sin.double(), case.widths, case.pairing)
    near = turn(both, cos, sin, case.widths, case.pairing)

    def turned(output: Any) -> Tensor:
        if isinstance(output, tuple):  # queries and keys of all tokens in a row
            output = torch.cat([x.unflatten(1, (-1, case.key)) for x in output], 1).unflatten(0, (case.batch, -1))
        found: Tensor = output[:, tokens]
        return found

    if not case.append:
        return [Expected("turned", turned, near, exact)]
    q, k = (x.split([case.heads, case.groups], 2) for x in (near, exact))
    return [
        Expected("q", lambda output: output[0][:, tokens], q[0], k[0]),
        Expected("k", lambda output: cached(output[1], "k", "key_scale", tokens), stored(case, q[1]), k[1]),
        Expected(
            "v", lambda output: cached(output[1], "v", "value_scale", tokens), stored(case, values), values.double()
        ),
    ]


def cached(kept: dict[str, Tensor], name: str, scale: str, tokens: Tensor) -> Tensor:
    """[B, T, G, K] as it stands in the cache, in numbers."""
    found = kept[name][:, :, HELD + tokens].transpose(1, 2)
    return found if scale not in kept else found.float() * kept[scale][:, :, HELD + tokens].transpose(1, 2)[..., None]


def stored(case: RotaryCase, x: Tensor) -> Tensor:
    """What a cache makes of x [B, T, G, K], by plain torch."""
    if case.append != "int8":
        return x
    scale = x.float().abs().amax(-1, keepdim=True) / 127
    return (x.float() / scale.clamp(min=1e-30)).round() * scale


def label(case: RotaryCase) -> str:
    """As "GLM-4-9B rotary + int8 cache"."""
    cache = "" if not case.append else " + int8 cache" if case.append == "int8" else " + cache"
    return f"{case.model} rotary{cache}"


SUBJECT = Subject(
    "rotary", "Rotary positions", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("tokens", case.batch * case.tokens),
)  # fmt: skip
