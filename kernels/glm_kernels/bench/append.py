"""A decode step's attention with all that belongs to it: turn, put into the cache, attend; one token a sequence.

Bytes: the cache before the token once, qkv, cos and sin, and written the token's key and value and o. Flops: 2 (K + Kv)
a visible key and query head. The roof is R, as for decode attention alone. The cache holds exactly the context. Every
call writes the same token into the same place, so that all calls compute the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from glm_kernels.bench import cases as published
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.rotary import turn
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, Side, Subject, Work, generator


@dataclass(frozen=True, kw_only=True)
class AppendCase(Case):
    """B sequences of one new token each, the last of S tokens."""

    heads: int
    groups: int
    key: int
    widths: tuple[int, ...]
    pairing: str
    batch: int
    keys: int


def case(model: published.Model, batch: int, keys: int, importance: int) -> AppendCase:
    """A case in the shape of `model`."""
    return AppendCase(
        model=model.name, dtype=model.dtype, heads=model.heads, groups=model.groups, key=model.key,
        widths=model.rotary[1], pairing=model.rotary[0], batch=batch, keys=keys, importance=importance,
    )  # fmt: skip


def all_cases() -> list[AppendCase]:
    """First one sequence of GLM-4-9B, then every model with a cache of keys and values, batch and context."""

    def everything() -> Iterator[AppendCase]:
        for keys in (1024, 8192, 32768):
            yield case(published.GLM_4_9B, 1, keys, 0)
        for model in published.NAMED:
            for batch in published.BATCHES if not model.latent else ():
                for keys in published.DECODE_CONTEXTS:
                    yield case(model, batch, keys, 1 if batch == 1 else 2)

    return list(dict.fromkeys(everything()))


def make_inputs(case: AppendCase, device: torch.device, seed: int) -> Inputs:
    """qkv, cos and sin, the cache, where the token goes, and how many there are with it."""
    random = generator(device, seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)

    angles = torch.rand(case.batch, 1, sum(case.widths) // 2, generator=random, device=device) * 6.28
    kept = case.batch, case.groups, case.keys, case.key
    length = torch.full((case.batch,), case.keys, dtype=torch.int32, device=device)
    return {
        "qkv": draw(case.batch, 1, (case.heads + 2 * case.groups) * case.key), "cos": angles.cos(),
        "sin": angles.sin(), "key_cache": draw(*kept), "value_cache": draw(*kept), "at": length - 1, "length": length,
    }  # fmt: skip


def work(case: AppendCase) -> Work:
    """See the head of this file."""
    size, token = case.torch_dtype.itemsize, 2 * case.groups * case.key
    cached = (case.keys - 1) * token * size
    qkv = (case.heads * case.key + token) * size + 4 * sum(case.widths)
    flops = 4 * case.key * case.keys * case.heads
    return Work(case.batch * (cached + qkv + token * size) + outputs(case), case.batch * flops)


def outputs(case: AppendCase) -> float:
    """Bytes of o."""
    return case.batch * case.heads * case.key * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def emptied(inputs: Inputs) -> Inputs:
    """The same with NaN where the token goes: a side that writes nothing must not find what another wrote."""
    for name in ("key_cache", "value_cache"):
        inputs[name][:, :, -1] = torch.nan
    return inputs


def ours(case: AppendCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    return partial(find(OURS, "append_attention"), **emptied(inputs), widths=case.widths, pairing=case.pairing)


def two_launches(case: AppendCase, inputs: Inputs) -> Call:
    """This project's `rotary_append`, then `decode_attention`: what the one launch is to be better than."""
    append, attend = find(OURS, "rotary_append"), find(OURS, "decode_attention")
    some = {name: x for name, x in emptied(inputs).items() if name != "length"}
    caches = inputs["key_cache"], inputs["value_cache"]

    def call() -> Tensor:
        q = append(**some, widths=case.widths, pairing=case.pairing)
        result: Tensor = attend(q.transpose(1, 2), *caches, inputs["length"]).transpose(1, 2)
        return result

    return call


def plain(case: AppendCase, inputs: Inputs) -> Tensor:
    """Plain torch. (It knows that all sequences end where the cache does; ours reads that on the device.)"""
    every = inputs["qkv"].unflatten(-1, (-1, case.key))
    both, new = every.split([case.heads + case.groups, case.groups], 2)
    q, k = turn(both, inputs["cos"], inputs["sin"], case.widths, case.pairing).split([case.heads, case.groups], 2)
    keys, values = inputs["key_cache"], inputs["value_cache"]
    keys[:, :, -1:], values[:, :, -1:] = k.transpose(1, 2), new.transpose(1, 2)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, enable_gqa=True).transpose(1, 2)


def torch_step(case: AppendCase, inputs: Inputs, compile: bool) -> Call:
    """Plain torch, as it is or compiled."""
    if compile:
        on_gpu(inputs["qkv"], "torch.compile")
    return partial(compiled(plain) if compile else plain, case, emptied(inputs))


def sides(case: AppendCase) -> list[Side]:
    """Ours and the peers."""
    return [
        Side(OURS, partial(ours, case)),
        Side("two launches", partial(two_launches, case)),
        Side("torch", partial(torch_step, case, compile=False)),
        Side("torch.compile", partial(torch_step, case, compile=True)),
    ]


# ----------------------------------------------------------------------------- what is right


def expected(case: AppendCase, inputs: Inputs) -> list[Expected]:
    """The output of some sequences, in all heads; and in the cache the token's key and value."""
    rows = sorted({0, case.batch - 1})

    def found(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        some = {name: x[rows] for name, x in inputs.items()}  # copies: the cache is written to
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        some |= {name: some[name].to(dtype) for name in ("qkv", "key_cache", "value_cache")}
        some |= {name: some[name].to(exact) for name in ("cos", "sin")}
        o = plain(case, some)
        return o, torch.cat([some[name][:, :, -1] for name in ("key_cache", "value_cache")], 1)

    def token(output: Any) -> Tensor:
        return torch.cat([inputs[name][rows][:, :, -1] for name in ("key_cache", "value_cache")], 1)

    (near, near_token), (truth, true_token) = found(case.torch_dtype), found(torch.float64)
    return [
        Expected("o", lambda out: out[rows], near, truth),
        Expected("key and value", token, near_token, true_token),
    ]


def label(case: AppendCase) -> str:
    """As "GLM-4-9B ×8"."""
    return f"{case.model} ×{case.batch}"


SUBJECT = Subject(
    "append", "Attention of a decode step, all of it", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("S", case.keys),
)  # fmt: skip
