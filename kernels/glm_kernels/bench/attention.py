"""Prefill attention: every mask of the family, forward, and forward with backward in the shapes of training.

Flops, on visible pairs only: 2 (K + Kv) a pair and head forward (scores, values), 2 (3 K + 2 Kv) more backward
(scores again, and the gradients of probabilities, values, queries and keys). Bytes: q, o, and the visible keys and
values once forward; backward those again with do, and dq, dk, dv.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from glm_kernels.bench import cases as published
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, MissingError, Side, Subject, Work, generator, sample
from glm_kernels.bench.visibility import Visibility, visibility

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
MASKS = "causal", "prefix", "infilling", "packed", "padded", "chunk"
SPANS = 4  # of an infilling sample
SAMPLES = 0.0, 0.15, 0.4, 0.55, 1.0  # where the samples of a packed row begin and end
DENSE = 2**31  # elements of a dense mask beyond which none is made
SCORES = 16 * 2**30  # bytes of scores beyond which the reference is not run


@dataclass(frozen=True, kw_only=True)
class AttentionCase(Case):
    """B sequences of T queries and S keys under one of MASKS."""

    heads: int
    groups: int
    key: int
    value: int
    mask: str
    batch: int
    queries: int
    keys: int
    backward: bool = False


def case(model: published.Model, mask: str, batch: int, queries: int, importance: int, **more: Any) -> AttentionCase:
    """A case in the shape of `model`."""
    return AttentionCase(
        model=model.name, dtype=model.dtype, heads=model.heads, groups=model.groups, key=model.key, value=model.value,
        mask=mask, batch=batch, queries=queries, keys=more.pop("keys", queries), importance=importance, **more,
    )  # fmt: skip


def all_cases() -> list[AttentionCase]:
    """First the shapes of the goals, then every model under its own mask, then batches, then the long and rare."""

    def everything() -> Iterator[AttentionCase]:
        for length in (8192, 4096, 16384, 32768):
            yield case(published.GLM_4_9B, "causal", 1, length, 0)
        for mask, length in (("causal", 4096), ("prefix", 4096), ("infilling", 4096), ("prefix", 8192)):
            yield case(published.CHATGLM_6B, mask, 1, length, 0)
        yield case(published.GLM_4_9B, "causal", 1, 8192, 0, backward=True)
        yield case(published.CHATGLM_6B, "prefix", 8, 2048, 0, backward=True)
        yield case(published.GLM_4_9B, "packed", 1, 8192, 1, backward=True)
        yield case(published.GLM_10B, "infilling", 8, 1024, 1, backward=True)
        yield case(published.GLM_4_9B, "chunk", 1, 2048, 1, keys=32768)
        for model in published.NAMED:
            own = "prefix" if model is published.CHATGLM_6B else "causal"
            for length in published.CONTEXTS:
                yield case(model, own, 1, length, 1)
                yield case(model, own, 8, length, 2)
                yield case(model, own, 32, length, 3)
            for length in (4096, 16384, 32768):
                yield case(model, own, 1, length, 2 if length == 4096 else 3, backward=True)
        for length in published.CONTEXTS:
            yield case(published.CHATGLM_6B, "causal", 1, length, 1)
            yield case(published.CHATGLM_6B, "infilling", 1, length, 1)
            yield case(published.CHATGLM_6B, "infilling", 8, length, 3)
        for length in (1024, 4096, 8192):
            yield case(published.CHATGLM3_6B, "padded", 8, length, 2)
            yield case(published.GLM_4_32B, "chunk", 1, 1024, 3, keys=4 * length)

    return list(dict.fromkeys(everything()))  # the first of equal ones, which is the most important


# ----------------------------------------------------------------------------- the masks


@lru_cache(maxsize=16)
def seen(case: AttentionCase) -> Visibility:
    """The bounds of a mask, different in every sequence of the batch."""
    batch, queries, keys = case.batch, case.queries, case.keys
    shorter = torch.arange(batch) * keys // (4 * batch)
    context = keys // 2 - shorter
    i = torch.arange(queries)[None].expand(batch, queries) + keys - queries
    given: dict[str, Tensor] = {}
    if case.mask == "prefix":
        given["prefix"] = context
    elif case.mask == "infilling":  # every span sees the context and itself
        given["prefix"] = context
        span = -(-(keys - context[:, None]) // SPANS)
        given["segment"] = torch.where(
            i < context[:, None], 0, context[:, None] + (i - context[:, None]) // span * span
        )
    elif case.mask == "packed":  # half of every sample is its prefix
        cuts = torch.tensor([int(part * keys) for part in SAMPLES])
        sample = torch.searchsorted(cuts[1:], i.contiguous(), right=True)
        given["start"] = cuts[sample]
        given["prefix"] = cuts[sample] + (cuts[sample + 1] - cuts[sample]) // 2
    elif case.mask == "padded":
        given["start"] = 2 * shorter
    elif case.mask not in ("causal", "chunk"):
        raise ValueError(f"no mask {case.mask!r}; there are {', '.join(MASKS)}")
    return visibility(batch, queries, keys, **{name: bound.int() for name, bound in given.items()})


def make_inputs(case: AttentionCase, device: torch.device, seed: int) -> Inputs:
    """q, k, v, for backward the gradient of the output, and the bounds as the kernel takes them."""
    random = generator(device, seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)

    inputs = {
        "q": draw(case.batch, case.heads, case.queries, case.key),
        "k": draw(case.batch, case.groups, case.keys, case.key),
        "v": draw(case.batch, case.groups, case.keys, case.value),
    }
    if case.backward:
        inputs["grad"] = draw(case.batch, case.heads, case.queries, case.value)
    return inputs | {name: bound.to(device) for name, bound in seen(case).given.items()}


def elements(case: AttentionCase) -> dict[str, int]:
    """How many elements q, o, and the visible parts of k and v have."""
    rows, keys = case.batch * case.heads * case.queries, seen(case).keys_seen() * case.groups
    return {"q": rows * case.key, "o": rows * case.value, "k": keys * case.key, "v": keys * case.value}


def work(case: AttentionCase) -> Work:
    """See the head of this file."""
    size, pairs = elements(case), seen(case).pairs() * case.heads
    flops, moved = 2 * (case.key + case.value) * pairs, sum(size.values())
    if case.backward:
        flops += 2 * (3 * case.key + 2 * case.value) * pairs
        moved += sum(size.values()) + size["o"] + size["q"] + size["k"] + size["v"]
    return Work(moved * case.torch_dtype.itemsize, flops)


def outputs(case: AttentionCase) -> float:
    """Bytes of o, and of dq, dk and dv."""
    full = case.batch * case.groups * case.keys * (case.key + case.value)
    size = elements(case)
    return (size["o"] + (size["q"] + full if case.backward else 0)) * case.torch_dtype.itemsize


# ----------------------------------------------------------------------------- the sides


def bound_names(inputs: Inputs) -> dict[str, Tensor]:
    """The bounds among the inputs."""
    return {name: inputs[name] for name in ("prefix", "start", "length", "segment") if name in inputs}


def call(inputs: Inputs, attend: Attend) -> Call:
    """The output, or for backward the output and three gradients."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    if "grad" not in inputs:
        return lambda: attend(q, k, v)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def train() -> tuple[Tensor, ...]:
        out = attend(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad"]))

    return train


def ours(case: AttentionCase, inputs: Inputs) -> Call:
    """The kernel of this project."""
    attention = find(OURS, "attention")
    return call(inputs, partial(attention, **bound_names(inputs)))


def reference(case: AttentionCase, inputs: Inputs) -> Call:
    """The reference of this project in plain torch, while its scores fit."""
    scores = 4 * case.batch * case.heads * case.queries * case.keys
    if scores > SCORES:
        raise MissingError(f"its scores take {scores / 1e9:.0f} GB")
    return call(inputs, partial(find("glm_kernels.attention", "attention_reference"), **bound_names(inputs)))


def dense_mask(case: AttentionCase, device: torch.device) -> Tensor:
    """[B, 1, T, S], 0 where visible and -∞ elsewhere, while it can be had."""
    if case.batch * case.queries * case.keys > DENSE:
        raise MissingError(f"a dense mask would have {case.batch * case.queries * case.keys:.1e} elements")
    return added_mask(case, device)


@lru_cache(maxsize=1)
def added_mask(case: AttentionCase, device: torch.device) -> Tensor:
    """[B, 1, T, S] of 0 and -∞, to be added to scores, which torch would otherwise make of a bool mask at each call."""
    mask = torch.full((case.batch, 1, case.queries, case.keys), -math.inf, device=device, dtype=case.torch_dtype)
    for b in range(case.batch):
        mask[b].masked_fill_(seen(case).dense([b], device=device), 0.0)
    return mask


def sdpa(case: AttentionCase, inputs: Inputs, backend: SDPBackend) -> Call:
    """`scaled_dot_product_attention` of torch with one backend; a dense mask where the mask is not causal."""
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    mask: Tensor | None = None
    causal = case.mask == "causal"
    if case.mask == "chunk":
        if backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(case.queries, case.keys)  # a Tensor to whoever asks
        else:
            mask = dense_mask(case, q.device)
    elif not causal:
        if backend == SDPBackend.FLASH_ATTENTION:
            raise MissingError("takes causal masks only")
        mask = dense_mask(case, q.device)
    times = case.heads // case.groups
    shares = backend != SDPBackend.EFFICIENT_ATTENTION  # it cannot have several query heads a key head
    if not shares and not case.backward:  # not timed, which is to its advantage
        inputs = {**inputs, "k": repeated(k, times), "v": repeated(v, times)}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not shares and case.backward:
            k, v = repeated(k, times), repeated(v, times)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shares and times > 1
            )

    return call(inputs, attend)


def repeated(x: Tensor, times: int) -> Tensor:
    """Every key head once for each of its query heads."""
    return x.repeat_interleave(times, 1) if times > 1 else x


def flex(case: AttentionCase, inputs: Inputs, tuned: bool) -> Call:
    """`flex_attention` with a compiled block mask, which is made before and not timed; eager on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = inputs["q"].device
    block_mask = mask_of_blocks(case, device, create_block_mask)
    function: Any = compiled(flex_attention, tuned) if device.type == "cuda" else flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = function(q, k, v, block_mask=block_mask, enable_gqa=case.heads > case.groups)
        return out

    return call(inputs, attend)


@lru_cache(maxsize=1)
def mask_of_blocks(case: AttentionCase, device: torch.device, create: Callable[..., Any]) -> Any:
    """The block mask of a case, shared by all copies of its inputs."""
    view, shape = seen(case), (case.batch, case.queries)
    prefix, start, length, segment = (
        bound.expand(shape).to(device, torch.int32).contiguous()
        for bound in (view.prefix, view.start, view.length, view.segment)
    )
    first = case.keys - case.queries

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        near = (segment[b, i] <= j) & (j <= i + first)
        return (start[b, i] <= j) & (j < length[b, i]) & ((j < prefix[b, i]) | near)

    def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i + first

    large = device.type == "cuda" and case.batch * case.queries * case.keys > 2**26
    batch = case.batch if view.given else None
    return create(visible if view.given else causal, batch, None, *shape[1:], case.keys, device, _compile=large)


WORKSPACE = 256 * 2**20  # bytes that flashinfer is given


def flashinfer(case: AttentionCase, inputs: Inputs) -> Call:
    """Its ragged prefill, which knows causal masks; others are given to it as dense bits."""
    wrapper = find("flashinfer", "BatchPrefillWithRaggedKVCacheWrapper")
    if case.backward:
        raise MissingError("has no backward pass")
    on_gpu(inputs["q"], "flashinfer")
    planned = planned_prefill(case, inputs["q"].device, wrapper)
    q, k, v = (inputs[name].transpose(1, 2).flatten(0, 1).contiguous() for name in "qkv")
    shape = case.batch, case.queries, case.heads, case.value
    return lambda: planned.run(q, k, v).view(shape).transpose(1, 2)


@lru_cache(maxsize=1)
def planned_prefill(case: AttentionCase, device: torch.device, wrapper: Any) -> Any:
    """The plan of a case, shared by all copies of its inputs."""
    queries, keys = (
        torch.arange(case.batch + 1, dtype=torch.int32, device=device) * count for count in (case.queries, case.keys)
    )
    mask = None if case.mask in ("causal", "chunk") else (dense_mask(case, device) == 0).flatten()
    planned = wrapper(torch.empty(WORKSPACE, dtype=torch.uint8, device=device), "NHD")
    planned.plan(
        queries, keys, case.heads, case.groups, case.key, head_dim_vo=case.value, custom_mask=mask,
        causal=mask is None, q_data_type=case.torch_dtype, kv_data_type=case.torch_dtype,
    )  # fmt: skip
    return planned


BACKENDS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def sides(case: AttentionCase) -> list[Side]:
    """Ours and the peers; `flex_attention` where the mask is more than causal, tuned by measurement."""
    found = [Side(OURS, partial(ours, case))]
    found += [Side(name, partial(sdpa, case, backend=backend)) for name, backend in BACKENDS.items()]
    if case.mask not in ("causal", "chunk"):
        found.append(Side("flex_attention", partial(flex, case, tuned=True)))
    found.append(Side("flashinfer", partial(flashinfer, case)))
    found.append(Side("reference", partial(reference, case)))
    return found


# ----------------------------------------------------------------------------- what is right


def probabilities(q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
    """[…, T, K], […, S, K], […, T, S] -> softmax of the visible scores, in float32, or float64 if q is."""
    scores = q @ k.transpose(-1, -2)
    scores = (scores if scores.dtype == torch.float64 else scores.float()) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~visible, -math.inf).softmax(-1).nan_to_num(0.0)  # who sees nothing gets nothing


def attended(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """[B, H, T, K], [B, G, S, K], [B, G, S, Kv], [B, T, S] -> [B, H, T, Kv], without a copy of keys for every head."""
    together = k.shape[1], q.shape[1] // k.shape[1] * q.shape[2]
    mask = visible.repeat(1, q.shape[1] // k.shape[1], 1)[:, None]
    out = probabilities(q.reshape(len(q), *together, q.shape[3]), k, mask).to(q.dtype) @ v
    return out.view(*q.shape[:3], v.shape[3])


def rows_checked(case: AttentionCase, most: int = 2**27) -> tuple[list[int], Tensor]:
    """Sequences, and queries of them that see something: as many as `most` scores allow."""
    sequences = sorted({0, case.batch - 1})
    live = (seen(case).counts()[sequences] > 0).all(0).nonzero().flatten()
    count = max(16, most // (len(sequences) * case.heads * case.keys))
    return sequences, live[sample(len(live), count)]


def forward_rows(case: AttentionCase, inputs: Inputs) -> Expected:
    """Some rows of the output, in all heads."""
    sequences, rows = rows_checked(case)
    device = inputs["q"].device
    visible = seen(case).dense(sequences, rows, device)
    rows = rows.to(device)

    def attend(dtype: torch.dtype) -> Tensor:
        q = inputs["q"][sequences][:, :, rows].to(dtype)
        k, v = (inputs[name][sequences].to(dtype) for name in "kv")
        return attended(q, k, v, visible)

    def pick(output: Any) -> Tensor:
        out: Tensor = output[0] if isinstance(output, tuple) else output
        some: Tensor = out[sequences]
        return some[:, :, rows]

    return Expected("o", pick, attend(case.torch_dtype), attend(torch.float64))


def gradients(case: AttentionCase, inputs: Inputs, dtype: torch.dtype, b: int, g: int) -> tuple[Tensor, ...]:
    """dq, dk and dv of one key head and its query heads, a few queries at a time.

    With p = softmax(s), s = q kᵀ / √K and o = p v:  dv = pᵀ do,  ds = p (dp - Σ p dp),  dp = do vᵀ,  dq = ds k / √K,
    dk = dsᵀ q / √K.
    """
    heads = slice(g * case.heads // case.groups, (g + 1) * case.heads // case.groups)
    q, do = (inputs[name][b, heads].to(dtype) for name in ("q", "grad"))
    k, v = (inputs[name][b, g].to(dtype) for name in "kv")
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    scale = 1 / math.sqrt(case.key)
    for rows in torch.arange(case.queries).split(512):
        visible = seen(case).dense([b], rows, q.device)[0]
        for h in range(len(q)):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            p = probabilities(q[h, part], k, visible)
            dp = (do[h, part] @ v.T).to(wide)
            ds = (p * (dp - (p * dp).sum(-1, keepdim=True))).to(dtype)
            dv += (p.to(dtype).T @ do[h, part]).to(wide)
            dk += (ds.T @ q[h, part]).to(wide) * scale
            dq[h, part] = ((ds @ k).to(wide) * scale).to(dtype)
    return dq, dk.to(dtype), dv.to(dtype)


def expected(case: AttentionCase, inputs: Inputs) -> list[Expected]:
    """Rows of the output, and the gradients around the last key head of the last sequence."""
    found = [forward_rows(case, inputs)]
    if case.backward:
        b, g = case.batch - 1, case.groups - 1
        heads = slice(g * case.heads // case.groups, (g + 1) * case.heads // case.groups)
        plain, truth = (gradients(case, inputs, dtype, b, g) for dtype in (case.torch_dtype, torch.float64))
        places: list[tuple[int | slice, ...]] = [(b, heads), (b, g), (b, g)]
        for i, (name, place) in enumerate(zip(("dq", "dk", "dv"), places, strict=True)):
            found.append(Expected(name, partial(part_of, i + 1, place), plain[i], truth[i]))
    return found


def part_of(i: int, place: tuple[int | slice, ...], output: tuple[Tensor, ...]) -> Tensor:
    """A part of the i-th output."""
    part: Tensor = output[i][place]
    return part


def label(case: AttentionCase) -> str:
    """As "GLM-4-9B causal ×8"."""
    chunk = f" of {case.queries}" if case.mask == "chunk" else ""
    training = " forward + backward" if case.backward else ""
    return f"{case.model} {case.mask}{chunk} ×{case.batch}{training}"


def axis(case: AttentionCase) -> tuple[str, int]:
    """The context."""
    return ("S", case.keys) if case.mask == "chunk" else ("T", case.queries)


SUBJECT = Subject(
    "attention", "Prefill attention", all_cases, make_inputs, outputs, work, sides, expected, label, axis
)  # fmt: skip
