"""Decode attention: one or a few new tokens against a cache, also in int8, also against GLM-4.7-Flash's latent.

Bytes: the live part of the cache once, start ≤ j < length (with its scales in int8), q, and o. Flops: 2 (K + Kv) a
visible pair and query head. What is read so little is bound by memory: the roof is R. The cache holds exactly the
context, except in the ragged cases, whose sequences are of different lengths.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_kernels.bench import cases as published
from glm_kernels.bench.attention import BACKENDS, WORKSPACE, attended, repeated
from glm_kernels.bench.peers import OURS, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator
from glm_kernels.bench.visibility import Visibility, visibility

PAGE = 64  # tokens in a page of flashinfer's cache


@dataclass(frozen=True, kw_only=True)
class DecodeCase(Case):
    """B sequences of T new tokens each, against caches of S tokens.

    cache  the dtype of the model, "int8", or "latent": the keys are [B, S, K] and their first Kv channels the values
    """

    heads: int
    groups: int
    key: int
    value: int
    batch: int
    queries: int
    keys: int
    cache: str = ""
    ragged: bool = False


def case(model: published.Model, batch: int, keys: int, importance: int, **more: Any) -> DecodeCase:
    """A case in the shape of `model`: of its latent where it has one."""
    groups, (key, value), kind = model.groups, (model.key, model.value), more.pop("cache", model.dtype)
    if model.latent:
        groups, (key, value), kind = 1, model.latent, "latent"
    return DecodeCase(
        model=model.name, dtype=model.dtype, heads=model.heads, groups=groups, key=key, value=value, batch=batch,
        queries=more.pop("queries", 1), keys=keys, importance=importance, cache=kind, **more,
    )  # fmt: skip


def all_cases() -> list[DecodeCase]:
    """First the shapes of the goals, then every model, batch and context, then int8, several tokens, ragged."""

    def everything() -> Iterator[DecodeCase]:
        for keys in (1024, 32768, 131072):
            yield case(published.GLM_4_9B, 1, keys, 0)
        yield case(published.GLM_4_9B, 32, 8192, 0)
        yield case(published.GLM_4_7_FLASH, 8, 32768, 0)
        yield case(published.CHATGLM_6B, 8, 8192, 0)
        yield case(published.GLM_4_9B, 8, 32768, 0, cache="int8")
        for model in published.NAMED:
            for batch in published.BATCHES:
                for keys in published.DECODE_CONTEXTS:
                    yield case(model, batch, keys, 1 if batch == 1 else 2)
            if not model.latent:
                for keys in (4096, 32768):
                    yield case(model, 8, keys, 2, cache="int8")
            yield case(model, 8, 8192, 2, queries=4)
            yield case(model, 8, 8192, 2, ragged=True)

    return list(dict.fromkeys(everything()))


@lru_cache(maxsize=16)
def seen(case: DecodeCase) -> Visibility:
    """Every query sees what stands before it: query i is at length - T + i."""
    lengths = torch.full((case.batch,), case.keys)
    if case.ragged:
        lengths -= torch.arange(case.batch) * case.keys // (2 * case.batch)
    view = visibility(case.batch, case.queries, case.keys, length=lengths)
    position = lengths[:, None] - case.queries + torch.arange(case.queries)
    return Visibility(view.prefix, view.start, view.length, view.segment, position, case.keys, view.given)


def make_inputs(case: DecodeCase, device: torch.device, seed: int) -> Inputs:
    """q, the cache, and on the device the lengths."""
    random = generator(device, seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)

    def draw_int8(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=random, device=device, dtype=torch.int8)

    inputs: dict[str, Any] = {"q": draw(case.batch, case.heads, case.queries, case.key)}
    kept = case.batch, case.groups, case.keys
    if case.cache == "latent":
        inputs["latent"] = draw(case.batch, case.keys, case.key)
    elif case.cache == "int8":
        inputs |= {"k": draw_int8(*kept, case.key), "v": draw_int8(*kept, case.value)}
        inputs |= {name: (1 + draw(*kept).float().abs()) / 127 for name in ("key_scale", "value_scale")}
    else:
        inputs |= {"k": draw(*kept, case.key), "v": draw(*kept, case.value)}
    return inputs | {"length": seen(case).given["length"].to(device, torch.int32)}


def token_bytes(case: DecodeCase) -> int:
    """Bytes of one token in the cache of one group."""
    size = case.torch_dtype.itemsize
    if case.cache == "latent":
        return case.key * size
    return case.key + case.value + 2 * 4 if case.cache == "int8" else (case.key + case.value) * size


def work(case: DecodeCase) -> Work:
    """See the head of this file."""
    cached = seen(case).keys_seen() * case.groups * token_bytes(case)
    flops = 2 * (case.key + case.value) * seen(case).pairs() * case.heads
    query = case.batch * case.heads * case.queries * case.key * case.torch_dtype.itemsize
    return Work(cached + query + outputs(case), flops)


def outputs(case: DecodeCase) -> float:
    """Bytes of o."""
    return case.batch * case.heads * case.queries * case.value * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def keys_values(case: DecodeCase, inputs: Inputs, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """[B, G, S, K] and [B, G, S, Kv] as numbers, whatever the cache is."""
    if case.cache == "latent":
        latent = inputs["latent"][:, None]
        k, v = latent, latent[..., : case.value]
    else:
        k, v = inputs["k"], inputs["v"]
    if dtype is not None:
        k, v = k.to(dtype), v.to(dtype)
    if case.cache == "int8":
        k = k * inputs["key_scale"][..., None].to(k.dtype if dtype else case.torch_dtype)
        v = v * inputs["value_scale"][..., None].to(v.dtype if dtype else case.torch_dtype)
    return k, v


def arguments(case: DecodeCase, inputs: Inputs) -> tuple[list[Tensor], dict[str, Any]]:
    """As our functions take them."""
    if case.cache == "latent":
        more: dict[str, Any] = {"value_width": case.value, "scale": 1 / math.sqrt(case.key)}
        return [inputs[name] for name in ("q", "latent", "length")], more
    more = {name: inputs[name] for name in ("key_scale", "value_scale") if name in inputs}
    return [inputs[name] for name in ("q", "k", "v", "length")], more


def ours(case: DecodeCase, inputs: Inputs, module: str, suffix: str) -> Call:
    """The kernel of this project, or its reference in plain torch."""
    name = "decode_latent_attention" if case.cache == "latent" else "decode_attention"
    return partial(find(module, name + suffix), *arguments(case, inputs)[0], **arguments(case, inputs)[1])


def sdpa(case: DecodeCase, inputs: Inputs, backend: SDPBackend) -> Call:
    """`scaled_dot_product_attention` of torch with one backend; a dense mask where the lengths differ."""
    if case.cache == "int8":
        raise MissingError("cannot read an int8 cache")
    k, v = keys_values(case, inputs)
    mask = None
    if case.ragged or case.queries > 1:
        if backend == SDPBackend.FLASH_ATTENTION:
            raise MissingError("takes causal masks only")
        mask = seen(case).dense(device=k.device)[:, None]
    shares = backend != SDPBackend.EFFICIENT_ATTENTION
    times = case.heads // case.groups
    if not shares:
        k, v = (x.expand(-1, case.heads, -1, -1) if case.groups == 1 else repeated(x, times) for x in (k, v))
    q = inputs["q"]

    def attend() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shares and times > 1)

    return attend


def pages(case: DecodeCase, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of pages that lie in order: where each sequence's begin, their numbers, and the tokens in each last one."""
    lengths = seen(case).given["length"]
    held = -(-lengths // PAGE)
    room = case.keys // PAGE
    numbers = torch.cat([b * room + torch.arange(int(n)) for b, n in enumerate(held)])
    first = torch.cat([torch.zeros(1, dtype=torch.long), held.cumsum(0)])
    tables = (first, numbers, lengths - (held - 1) * PAGE)
    return tables[0].to(device).int(), tables[1].to(device).int(), tables[2].to(device).int()


def flashinfer(case: DecodeCase, inputs: Inputs) -> Call:
    """Its paged decode, on tensor cores where heads share keys, or its latent attention; planned beforehand."""
    latent = case.cache == "latent"
    place = "flashinfer.mla" if latent else "flashinfer"
    wrapper = find(place, "BatchMLAPagedAttentionWrapper" if latent else "BatchDecodeWithPagedKVCacheWrapper")
    q = inputs["q"]
    on_gpu(q, "flashinfer")
    if case.queries > 1:
        raise MissingError("decodes one token a sequence")
    if case.cache == "int8":
        raise MissingError("cannot read an int8 cache")
    if case.keys % PAGE:
        raise MissingError(f"the context is not a multiple of its page of {PAGE}")
    planned = planned_decode(case, q.device, wrapper)
    rows, shape = q[:, :, 0].contiguous(), (case.batch, case.heads, 1, case.value)
    if latent:
        parts = [
            x.split([case.value, case.key - case.value], -1) for x in (rows, inputs["latent"].view(-1, PAGE, case.key))
        ]
        (q_content, q_turned), (content, turned) = ([half.contiguous() for half in part] for part in parts)
        return lambda: planned.run(q_content, q_turned, content, turned).view(shape)
    paged = tuple(inputs[name].transpose(1, 2).contiguous().view(-1, PAGE, case.groups, case.key) for name in "kv")
    return lambda: planned.run(rows, paged).view(shape)


@lru_cache(maxsize=1)
def planned_decode(case: DecodeCase, device: torch.device, wrapper: Any) -> Any:
    """The plan of a case, shared by all copies of its inputs."""
    first, numbers, last = pages(case, device)
    workspace = torch.empty(WORKSPACE, dtype=torch.uint8, device=device)
    dtype = case.torch_dtype
    if case.cache == "latent":
        planned = wrapper(workspace)
        starts = torch.arange(case.batch + 1, device=device, dtype=torch.int32)
        lengths = seen(case).given["length"].to(device, torch.int32)
        planned.plan(
            starts, first, numbers, lengths, case.heads, case.value, case.key - case.value, PAGE, False,
            1 / math.sqrt(case.key), dtype, dtype,
        )  # fmt: skip
        return planned
    planned = wrapper(workspace, "NHD", use_tensor_cores=case.heads // case.groups >= 4)
    planned.plan(first, numbers, last, case.heads, case.groups, case.key, PAGE, q_data_type=dtype, kv_data_type=dtype)
    return planned


def sides(case: DecodeCase) -> list[Side]:
    """Ours and the peers."""
    found = [Side(OURS, partial(ours, case, module=OURS, suffix=""))]
    found += [Side(name, partial(sdpa, case, backend=backend)) for name, backend in BACKENDS.items()]
    found.append(Side("flashinfer", partial(flashinfer, case)))
    found.append(Side("reference", partial(ours, case, module="glm_kernels.decode", suffix="_reference")))
    return found


# ----------------------------------------------------------------------------- what is right


def expected(case: DecodeCase, inputs: Inputs) -> list[Expected]:
    """The output of some sequences, in all heads."""
    sequences = sorted({0, case.batch - 1})
    visible = seen(case).dense(sequences, device=inputs["q"].device)
    some = {name: value[sequences] for name, value in inputs.items()}

    def attend(dtype: torch.dtype) -> Tensor:
        return attended(some["q"].to(dtype), *keys_values(case, some, dtype), visible)

    return [Expected("o", lambda out: out[sequences], attend(case.torch_dtype), attend(torch.float64))]


def label(case: DecodeCase) -> str:
    """As "GLM-4-9B ×8 int8"."""
    words = [case.model, f"×{case.batch}"]
    words += [case.cache] if case.cache in ("int8", "latent") else []
    words += [f"{case.queries} tokens"] if case.queries > 1 else []
    return " ".join(words + (["ragged"] if case.ragged else []))


SUBJECT = Subject(
    "decode", "Decode attention", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("S", case.keys),
)  # fmt: skip
