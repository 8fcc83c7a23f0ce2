"""What a model asks of memory, and whether it fits: worked out from its spec, before any weight is read.

    needed = weights + cache + working space
    cache  = (context + prefix) · Σ_layers Σ_remembered heads · width      (attention: two tensors of G heads, K wide)

Weights and cache are exact: they are counted on the meta device. Working space is an upper estimate of what a
forward pass holds besides: its widest activations, and one matrix in full (as loading and integer weights need it).
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from glm import family
from glm.errors import GLMError, MemoryFitError
from glm.family.generation import Generation, Release
from glm.fields import read_object
from glm.hub import fetch
from glm.layout import Causal
from glm.linear import Dense, RowScaled, Weights
from glm.memory import Found, memory_found, size
from glm.model import GLM
from glm.spec import Spec

USUAL_CONTEXT = 2048  # tokens to leave room for where nobody said how many
PIECE = 2048  # tokens of a prompt that go through a causal model at once

STORAGES: dict[str, tuple[torch.dtype, Weights]] = {
    "fp32": (torch.float32, Dense()),
    "bf16": (torch.bfloat16, Dense()),
    "int8": (torch.bfloat16, RowScaled(8)),
    "int4": (torch.bfloat16, RowScaled(4)),
}
"""Ways to store a model: the dtype of embedding, head, norms and cache, and how the matrices of the blocks lie."""

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Need:
    """What one sequence of `context` tokens takes, in bytes."""

    context: int
    weights: int
    per_token: int  # of the cache
    cache: int
    working: int

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.working


@dataclass(frozen=True)
class Info:
    """All that can be said of a checkpoint without its weights."""

    source: str
    generation: str
    release: Release | None  # where `source` names one
    spec: Spec
    dtype: torch.dtype  # of what its files hold as floating-point numbers
    parameters: int
    storage: str  # the key of `needs` that was asked for
    needs: dict[str, Need]  # by storage: "stored" as the files have it, then the keys of STORAGES
    found: Found | None  # None: unknown

    @property
    def need(self) -> Need:
        """In the storage asked for."""
        return self.needs[self.storage]

    def fits(self, storage: str | None = None) -> bool | None:
        """Whether it fits the memory found, in the storage asked for or another one; None where that is unknown."""
        return None if self.found is None else self.needs[storage or self.storage].bytes <= self.found.bytes


def describe(
    source: str | os.PathLike[str],
    context: int | None = None,
    weights: str = "stored",
    *,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> Info:
    """What is known of `source`: a folder, the name of a release (`glm.releases()`), or a hub id (reads its config).

    `context` tokens (default: all the release takes) are to fit beside the weights, stored as in the files
    ("stored") or as one of `STORAGES`. Raises GLMError for a context or storage out of range, CheckpointError for
    a source that is no GLM.
    """
    if weights not in ("stored", *STORAGES):
        raise GLMError(f"weights cannot be stored as {weights!r}; choose one of stored, {', '.join(STORAGES)}")
    if context is not None and context < 1:
        raise GLMError(f"a context of {context} tokens holds nothing; ask for at least 1")
    release = None if Path(source).is_dir() else family.releases().get(str(source))
    if release is not None:
        generation, spec, dtype = family.generation_of(release.name), release.spec, release.dtype
    else:
        generation, spec, dtype = _from_config(source, revision)
    ways = {"stored": (dtype, spec.weights)} | STORAGES
    tokens = spec.context if context is None else context
    return Info(
        source=str(source),
        generation=generation.name,
        release=release,
        spec=spec,
        dtype=dtype,
        parameters=parameters(spec),
        storage=weights,
        needs={way: need(replace(spec, weights=w), d, tokens) for way, (d, w) in ways.items()},
        found=memory_found(device),
    )


def _from_config(source: str | os.PathLike[str], revision: str | None) -> tuple[Generation, Spec, torch.dtype]:
    """What the config.json of a folder or hub id says."""
    folder = fetch(source, revision=revision, weights=False)
    config = read_object(folder / "config.json")
    generation = family.recognise(config)
    return generation, generation.read(config, Path(source).name), stored_dtype(config)


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config.json says its weights have; float32 where it says none, as in transformers."""
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)


def require_fit(
    spec: Spec, dtype: torch.dtype, device: torch.device | str | None = None, context: int | None = None
) -> None:
    """Raise MemoryFitError, with the numbers, unless a model of `spec` in `dtype` fits the device's free memory.

    Room is asked for one sequence of `context` tokens, by default min(2048, what the release takes).
    """
    found = memory_found(device)
    asked = need(spec, dtype, min(USUAL_CONTEXT, spec.context) if context is None else context)
    if found is None or asked.bytes <= found.bytes:
        return
    raise MemoryFitError(
        f"the model needs {size(asked.bytes)} ({size(asked.weights)} of weights, {size(asked.cache)} of cache for "
        f"{asked.context:,} tokens, {size(asked.working)} to work in), but only {size(found.bytes)} of memory "
        f"are {found.where}; free some, or take a smaller dtype, a smaller release or another device"
    )


def need(spec: Spec, dtype: torch.dtype, context: int) -> Need:
    """What one sequence of `context` tokens through a model of `spec` in `dtype` takes."""
    per_token = cache_bytes_per_token(spec, dtype)
    before = 0 if spec.prefix is None else spec.prefix.length
    return Need(
        context=context,
        weights=weight_bytes(spec, dtype),
        per_token=per_token,
        cache=per_token * (before + context),
        working=working_bytes(spec, dtype, context),
    )


@cache
def tensors(spec: Spec, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Every parameter and buffer of the model, without its numbers; a tied head counts once."""
    model = GLM(spec, device="meta", dtype=dtype)
    return (*model.parameters(), *model.buffers())


def parameters(spec: Spec) -> int:
    """Numbers the model has learnt, however its matrices are stored."""
    return sum(x.numel() for x in tensors(replace(spec, weights=Dense()), torch.float32))


def weight_bytes(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes of all parameters, stored as the spec says, with `dtype` for whatever is not an integer."""
    return sum(x.nbytes for x in tensors(spec, dtype))


def cache_bytes_per_token(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes that one more token adds to a cache."""
    return dtype.itemsize * sum(heads * width for block in spec.blocks for heads, width in block.mixer.remembers)


def working_bytes(spec: Spec, dtype: torch.dtype, tokens: int) -> int:
    """An upper estimate of what a forward pass over `tokens` holds beside weights and cache.

    Per token the stream in four states (x, its norm, what is added, the sum) and either attention (q, k, v, turned,
    and laid out for the product) or the feed-forward (its branches, active ones, their product); a mask, where a
    token sees more than its past; the logits of one token in float32, sorted to sample from; and one matrix: on its
    way from the file, or integers being written out (as they are, unpacked, converted and scaled).
    """
    causal = isinstance(spec.reading, Causal)
    T = min(tokens, PIECE) if causal else tokens
    widest = max(
        max(
            3 * (block.mixer.heads + 2 * block.mixer.groups) * block.mixer.head_width,
            (2 * len(block.feed_forward.branches) + 1) * block.feed_forward.inner,
        )
        for block in spec.blocks
    )
    streams = T * (4 * spec.width + widest) * dtype.itemsize
    mask = 0 if causal else T * tokens * (2 + dtype.itemsize)
    logits = 8 * spec.vocabulary * torch.float32.itemsize
    per_byte = 1 if isinstance(spec.weights, Dense) else 8 // spec.weights.bits
    matrix = max(
        x.numel() * dtype.itemsize if x.is_floating_point() else x.nbytes * per_byte * (2 + 2 * dtype.itemsize)
        for x in tensors(spec, dtype)
    )
    return streams + mask + logits + matrix
