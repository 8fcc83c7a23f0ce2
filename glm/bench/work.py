"""What is counted: bytes that a step must read, and flops that a prompt costs.

    floor   from the spec alone: every matrix once a step as it is stored, with norms and biases and the head, and the
            keys and values of every row. The embedding is looked up, a few rows, and does not count; of experts those
            that different tokens are likely to meet do.
    moved   the same from what the engine holds: its matrices as they are laid out, and its cache.

Flops: 2 a weight and token, of the head for the last token only; and of attention 2 (K + Kv) a head and visible pair.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glm.attention import Attention
from glm.bench.cases import RuntimeCase
from glm.experts import Experts
from glm.info import active_parameters, cache_bytes_per_token, tensors, weight_bytes
from glm.layout import Blank
from glm.linear import Dense
from glm.runtime import Engine
from glm.runtime.feed_forward import FusedExperts
from glm.runtime.matrices import Matrix
from glm.spec import Spec


def floor(spec: Spec, dtype: torch.dtype, batch: int, tokens: float) -> float:
    """Bytes of a step of `batch` rows that have `tokens` tokens each, this one among them."""
    return weights_read(spec, dtype, batch) + batch * tokens * cache_bytes_per_token(spec, dtype)


def weights_read(spec: Spec, dtype: torch.dtype, batch: int) -> float:
    """Bytes of weights that a step reads."""
    looked_up = 0 if spec.tied else spec.vocabulary * spec.width
    if spec.learned is not None:
        looked_up += spec.learned.axes * spec.learned.length * spec.width
    spared = sum(
        (1 - met(part.count, part.top, batch)) * part.count * expert_bytes(part, spec, dtype)
        for part in (block.feed_forward for block in spec.blocks)
        if isinstance(part, Experts)
    )
    return weight_bytes(spec, dtype) - looked_up * dtype.itemsize - spared


def met(count: int, top: int, tokens: int) -> float:
    """The part of `count` experts that so many tokens are likely to meet, `top` each, if all are as likely."""
    return 1 - (1 - top / count) ** tokens


def expert_bytes(experts: Experts, spec: Spec, dtype: torch.dtype) -> int:
    """Of one expert."""
    with torch.device("meta"):
        module = experts.expert.build(spec.width, spec.weights).to(dtype)
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def moved(engine: Engine, case: RuntimeCase, tokens: float) -> float:
    """Bytes of a step, by what the engine holds."""
    composed = engine.composed
    sizes = (size for block in composed.blocks for size in held((block.mixer, block.feed_forward), case.batch))
    cache = case.batch * tokens * engine.bytes / (engine.slots.rows * engine.slots.places)
    return sum(sizes) + composed.head.bytes + cache


def held(parts: Any, batch: int) -> Iterator[float]:
    """Bytes of every matrix in some parts of the engine that a step reads."""
    for part in parts:
        if isinstance(part, Matrix):
            yield part.bytes
        elif isinstance(part, FusedExperts):
            seen = met(part.count, part.router.top, batch)
            yield seen * sum(held((part.up, part.down), batch))
            yield from held((part.router, part.shared), batch)
        elif isinstance(part, nn.Module):
            yield sum(x.nbytes for x in part.state_dict().values())
        elif isinstance(part, Tensor):
            yield part.nbytes
        elif hasattr(part, "__dict__"):
            inside = vars(part)
            yield from held((inside[name] for name in inside if name not in ("spec", "turns", "into", "from_")), batch)


def flops(spec: Spec, tokens: int) -> float:
    """Of a prompt of so many tokens, up to its first new one."""
    dense = replace(spec, weights=Dense(), head=Dense())
    vectors = sum(x.numel() for x in tensors(dense, torch.float32) if x.dim() == 1)  # norms and biases multiply nothing
    matrices = active_parameters(spec) - vectors - (1 if spec.tied else 2) * spec.vocabulary * spec.width
    pairs = visible(spec, tokens)
    attention = sum(channels(block.mixer) for block in spec.blocks)
    return 2.0 * tokens * matrices + 2.0 * spec.vocabulary * spec.width + 2.0 * attention * pairs


def visible(spec: Spec, tokens: int) -> int:
    """Pairs of query and key in a prompt: a model that fills a blank reads all but the start token both ways."""
    return (tokens - 1) ** 2 + tokens if isinstance(spec.reading, Blank) else tokens * (tokens + 1) // 2


def channels(mixer: Any) -> int:
    """Channels of a query and a value over all heads."""
    if isinstance(mixer, Attention):
        return 2 * mixer.heads * mixer.head_width
    return int(mixer.heads * (mixer.plain + mixer.rotary + mixer.value))
