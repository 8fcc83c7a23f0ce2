"""Random weights at a published shape.

Matrices are N(0, 0.02²), biases too, and the weights of norms are near 1, none of them equal, so that a side which
leaves one out shows. Integers are drawn as integers, uniformly and right in their packed layout, with scales that give
the same spread: nothing is quantised, which for the largest models would take hours.
"""

import math

import torch

from glm.bench.cases import RuntimeCase
from glm.grouped import Grouped
from glm.model import GLM
from glm.synthesize import SPREAD

NORMS = 0.1  # spread of the weights of norms


def random_model(case: RuntimeCase, device: torch.device, seed: int = 0) -> GLM:
    """The model of a case."""
    spec = case.spec
    model = GLM(spec, device=device, dtype=case.torch_dtype, seed=seed).train(False).requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed + 1)
    for name, x in model.state_dict().items():
        if name.endswith("weight_packed"):
            x.view(torch.int8).random_(-128, 128, generator=generator)
        elif name.endswith("weight_scale"):
            assert isinstance(spec.weights, Grouped)
            x.fill_(SPREAD / math.sqrt((4**spec.weights.bits - 1) / 12))
        elif x.dim() == 1 and x.is_floating_point():
            middle, spread = (0.0, SPREAD) if name.endswith("bias") else (1.0, NORMS)
            x.normal_(middle, spread, generator=generator)
    return model
