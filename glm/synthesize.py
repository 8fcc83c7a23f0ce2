"""Checkpoints of random weights: any release at its true size and in its official layout, without a download.

For measuring memory and speed, and for testing what loads them. The text such a model writes is noise.
"""

import zlib
from dataclasses import replace
from os import PathLike

import torch
from torch import Tensor

from glm import family
from glm.checkpoint import save
from glm.errors import GLMError
from glm.export import exported
from glm.linear import Weights
from glm.model import GLM
from glm.tensor_file import Progress

SPREAD = 0.02  # standard deviation of the weights


def synthesize(
    release: str,
    folder: str | PathLike[str],
    *,
    seed: int = 0,
    layers: int | None = None,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the release with random weights, in as many shards as the original; `layers` keeps only the first ones.

    `weights` is how the matrices of the blocks are stored, by default as the release has them.

    Tensors are drawn one at a time, each from `seed` and its own name. `progress` is told bytes written.
    Raises GLMError for an unknown release, or a folder that is taken.
    """
    chosen, generation = family.release(release), family.generation_of(release)
    spec = chosen.spec
    if layers is not None:
        if not 1 <= layers <= len(spec.blocks):
            raise GLMError(f"{chosen.name} has {len(spec.blocks)} layers, of which {layers} cannot be kept")
        spec = replace(spec, blocks=spec.blocks[:layers])
    spec = replace(spec, weights=weights or spec.weights)
    shapes = GLM(spec, device="meta").state_dict()
    config, tensors = exported(
        generation,
        spec,
        shapes,
        lambda stored: drawn(stored.name, stored.part(shapes[stored.parameter]), seed),
        lambda _: dtype or chosen.dtype,
    )
    total = sum(tensor.nbytes for tensor in tensors)
    save(folder, config, tensors, shard_bytes=-(-total // chosen.shards), progress=progress)


def drawn(name: str, shape: Tensor, seed: int) -> Tensor:
    """Numbers for the tensor `name`: norm weights 1, biases and matrices N(0, 0.02²), integers of that spread."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)
    if not shape.is_floating_point():
        least = torch.iinfo(shape.dtype).min
        return torch.randint(least, -least, shape.shape, dtype=shape.dtype, generator=generator)
    if name.endswith("weight_scale"):
        return torch.full(shape.shape, SPREAD / 4)
    if shape.dim() == 1 and name.endswith("weight"):
        return torch.ones(shape.shape)
    return torch.empty(shape.shape, dtype=torch.bfloat16).normal_(0, SPREAD, generator=generator)
