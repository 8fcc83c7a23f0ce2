"""What a model asks of memory, and whether it fits: worked out from its spec, before any weight is read.

    needed = weights + cache + working space
    cache  = (context + prefix) · Σ_layers Σ_remembered heads · width      (attention: two tensors of G heads, K wide)

Weights and cache are exact: they are counted on the meta device. Working space is an upper estimate of what a
forward pass holds besides: its widest activations, and one matrix in full where its weights are integers.
"""

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glm import family
from glm.errors import CheckpointError, GLMError, MemoryFitError
from glm.experts import Experts
from glm.family.generation import Generation, Release
from glm.fields import read_object
from glm.grouped import Grouped, fitting
from glm.hub import fetch
from glm.layout import Causal
from glm.linear import Dense, Weights
from glm.memory import Found, memory_found, size
from glm.model import GLM
from glm.spec import Block, Spec
from glm.tensor_file import PIECE as FILE_PIECE

USUAL_CONTEXT = 2048  # tokens to leave room for where nobody said how many
PIECE = 2048  # tokens of a prompt that go through a causal model at once


class Groups(Grouped):
    """As `Grouped`, for any model: a matrix takes the largest group that divides its rows, as in `glm.Engine`.

    One whose rows do not fill 32-bit words stays dense.
    """

    def form(self, inputs: int) -> Weights:
        """That of a matrix with so many columns."""
        return Dense() if inputs * self.bits % 32 else fitting(self, inputs)

    def linear(self, inputs: int, outputs: int, bias: bool) -> torch.nn.Module:
        """A module [..., inputs] -> [..., outputs]."""
        return self.form(inputs).linear(inputs, outputs, bias)

    def stack(self, count: int, inputs: int, outputs: int, bias: bool) -> torch.nn.Module:
        """`count` such layers in one."""
        return self.form(inputs).stack(count, inputs, outputs, bias)


STORAGES: dict[str, tuple[torch.dtype, Weights]] = {
    "fp32": (torch.float32, Dense()),
    "bf16": (torch.bfloat16, Dense()),
    "int8": (torch.bfloat16, Groups(8, 128, symmetric=True)),
    "int4": (torch.bfloat16, Groups(4, 128, symmetric=True)),
}
"""Ways to store a model: the dtype of embedding, head, norms and cache, and how the matrices of the blocks lie.

Integers are those that `glm quantize` writes and `glm.Engine` makes: a scale for each 128 columns of a row, 0.516 bytes
a weight in four bits. The official files have one scale for a whole row; "stored" counts those.
"""

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
    active: int  # of those, what one token goes through
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
    known = named(source, revision)
    spec, dtype = known.spec, known.dtype
    tokens = spec.context if context is None else context
    return Info(
        source=str(source),
        generation=known.generation.name,
        release=known.release,
        spec=spec,
        dtype=dtype,
        parameters=parameters(spec),
        active=active_parameters(spec),
        storage=weights,
        needs={"stored": need(spec, dtype, tokens)}
        | {way: need(replace(spec, weights=w, head=Dense()), d, tokens) for way, (d, w) in STORAGES.items()},
        found=memory_found(device),
    )


class Named(NamedTuple):
    """What a source is called by and says of itself, without its weights."""

    generation: Generation
    release: Release | None  # where the source names one
    spec: Spec
    dtype: torch.dtype  # of what its files hold as floating-point numbers


def named(source: str | os.PathLike[str], revision: str | None = None) -> Named:
    """What a folder, the name of a release, or a hub id (reads its config) stands for.

    Raises CheckpointError where it is none of them, ConfigError for a config.json that is no GLM's.
    """
    if not Path(os.path.expanduser(source)).exists() and "/" not in str(source):
        try:
            release = family.release(str(source))
        except GLMError as error:
            raise CheckpointError(f"{source}: there is no such folder, and {error}") from None
        return Named(family.generation_of(release.name), release, release.spec, release.dtype)
    config = read_object(fetch(source, revision=revision, weights=False) / "config.json")
    generation = family.recognise(config)
    return Named(generation, None, generation.read(config, Path(source).name), stored_dtype(config))


def stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype a config.json says its weights have; float32 where it says none, as in transformers."""
    return DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32)


def require_fit(
    spec: Spec,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    context: int | None = None,
    ranks: int = 1,
) -> None:
    """Raise MemoryFitError, with the numbers, unless a model of `spec` in `dtype` fits the device's free memory.

    Room is asked for one sequence of `context` tokens, by default min(2048, what the release takes). With several
    `ranks`, `spec` is what one of them holds, except that of the vocabulary it holds its part; on the CPU they share
    the memory.
    """
    found = memory_found(device)
    asked = need(spec, dtype, min(USUAL_CONTEXT, spec.context) if context is None else context)
    if ranks > 1:
        vocabulary = (1 if spec.tied else 2) * spec.vocabulary * spec.width * dtype.itemsize
        asked = replace(asked, weights=asked.weights - vocabulary + vocabulary // ranks)
        if found is not None and torch.device(device or torch.get_default_device()).type == "cpu":
            found = Found(found.bytes // ranks, f"{found.where} to each of {ranks} processes")
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
    """Every parameter and buffer of the model, without its numbers; a tied head counts once.

    Blocks that are built alike are built once, and stand here as often as the model has them.
    """
    distinct = tuple(dict.fromkeys(spec.blocks)) if spec.prefix is None else spec.blocks
    times: Counter[Block] = Counter(spec.blocks if spec.prefix is None else ())
    model = GLM(replace(spec, blocks=distinct), device="meta", dtype=dtype)
    inside = [
        x for block, module in zip(distinct, model.blocks, strict=True) for x in once(module) * (times[block] or 1)
    ]
    model.blocks = torch.nn.ModuleList()
    return (*once(model), *inside)


def once(module: torch.nn.Module) -> list[torch.Tensor]:
    """A module's parameters and buffers, each once."""
    return [*module.parameters(), *module.buffers()]


def parameters(spec: Spec) -> int:
    """Numbers the model has learnt, however its matrices are stored."""
    return sum(x.numel() for x in tensors(replace(spec, weights=Dense(), head=Dense()), torch.float32))


def active_parameters(spec: Spec) -> int:
    """Of those, what a token goes through: all but the experts that are not chosen for it."""
    spared = 0
    for block in spec.blocks:
        if isinstance(block.feed_forward, Experts):
            spared += (block.feed_forward.count - block.feed_forward.top) * expert_parameters(
                block.feed_forward, spec.width
            )
    return parameters(spec) - spared


def expert_parameters(experts: Experts, width: int) -> int:
    """Numbers of one expert."""
    with torch.device("meta"):
        return sum(x.numel() for x in experts.expert.build(width, Dense()).parameters())


def weight_bytes(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes of all parameters, stored as the spec says, with `dtype` for whatever is not an integer."""
    return sum(x.nbytes for x in tensors(spec, dtype))


def cache_bytes_per_token(spec: Spec, dtype: torch.dtype) -> int:
    """Bytes that one more token adds to a cache."""
    numbers: int = sum(heads * width for block in spec.blocks for heads, width in block.mixer.remembers)
    return numbers * dtype.itemsize


def working_bytes(spec: Spec, dtype: torch.dtype, tokens: int) -> int:
    """An upper estimate of what a forward pass over `tokens` holds beside weights and cache.

    A causal model is taken to read `PIECE` tokens at a time, as the command line and the engine do. Per token of a
    piece the stream in four states (x, its norm, what is added, the sum) and either the feed-forward (its branches,
    active ones, their product) or the attention (q, k, v, turned, and laid out for the product), with what it makes of
    all tokens before (latent attention writes out keys and values of every head, an indexer scores all pairs). A mask,
    where a token sees more than its past or the past is longer than the piece; the logits of one token in float32,
    sorted to sample from; and what is on its way from a file, or one matrix of integers being written out (as they are,
    unpacked, converted and scaled).
    """
    causal = isinstance(spec.reading, Causal)
    T = min(tokens, PIECE) if causal else tokens
    before = 0 if spec.prefix is None else spec.prefix.length
    inside: int = max(
        max(
            T * block.mixer.working(spec.width) * dtype.itemsize
            + block.mixer.looking(T, before + tokens, dtype.itemsize),
            T * block.feed_forward.working(spec.width) * dtype.itemsize,
        )
        for block in spec.blocks
    )
    streams = 4 * T * spec.width * dtype.itemsize + inside
    mask = 0 if causal and before + tokens == T else T * (before + tokens) * (2 + dtype.itemsize)
    logits = 8 * spec.vocabulary * torch.float32.itemsize
    written_out = 0 if isinstance(spec.weights, Dense) else 8 // spec.weights.bits * (2 + 2 * dtype.itemsize)
    integers = (x for x in tensors(spec, dtype) if not x.is_floating_point())
    matrix = max(FILE_PIECE, *(written_out * x.shape[-2:].numel() * x.itemsize for x in integers), 0)
    return streams + mask + logits + matrix
