"""Cases of one question: a model computes with a field changed, and which field is it?"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

import glm
from docs.check import Case
from glm.spec import Spec


def cases(right: glm.GLM, changes: Iterable[Spec], ids: Tensor) -> Iterator[Case]:
    """For each spec, which has one field changed, a model of it with the numbers of the `right` one, and ids [B, T]."""
    for changed in changes:
        broken = glm.GLM(changed, dtype=right.dtype)
        broken.load_state_dict(right.state_dict())
        [difference] = glm.diff(right.spec, changed).changes
        arguments = {"right": right, "broken": torch.inference_mode()(broken.__call__), "ids": ids}
        yield Case(arguments, {"result": difference.field})
