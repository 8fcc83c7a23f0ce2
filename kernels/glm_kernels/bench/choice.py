"""The likeliest token of every row, and whether all of its logits are numbers.

Bytes: V logits a row read, an id of 8 bytes written. Flops: one comparison a logit. For few rows it is neither R nor C
that bounds it but the launches.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from glm_kernels.bench import cases as published
from glm_kernels.bench.peers import OURS, compiled, find, on_gpu
from glm_kernels.bench.subject import Call, Case, Expected, Inputs, Side, Subject, Work, generator

VOCABULARIES = {  # logits that a model's head gives
    published.CHATGLM_6B: 130528,
    published.CHATGLM3_6B: 65024,
    published.GLM_4_9B: 151552,
}
LARGEST = 100.0


@dataclass(frozen=True, kw_only=True)
class ChoiceCase(Case):
    """N rows of V logits."""

    vocabulary: int
    rows: int


def all_cases() -> list[ChoiceCase]:
    """Every vocabulary, for as many sequences as are decoded at once."""

    def everything() -> Iterator[ChoiceCase]:
        for model, vocabulary in VOCABULARIES.items():
            for rows in published.BATCHES:
                first = model is published.GLM_4_9B and rows == 1
                yield ChoiceCase(
                    model=model.name, dtype=model.dtype, vocabulary=vocabulary, rows=rows, importance=0 if first else 2
                )

    return list(everything())


def make_inputs(case: ChoiceCase, device: torch.device, seed: int) -> Inputs:
    """Logits, one of each row far above the others: of those that are equal a peer may take any."""
    random = generator(device, seed)
    shape = case.rows, case.vocabulary
    logits = torch.randn(shape, generator=random, device=device, dtype=case.torch_dtype)
    top = torch.rand(case.rows, 1, generator=random, device=device) * case.vocabulary
    return {"logits": logits.scatter_(1, top.long().clamp(max=case.vocabulary - 1), LARGEST)}


def work(case: ChoiceCase) -> Work:
    """See the head of this file."""
    logits = case.rows * case.vocabulary
    return Work(logits * case.torch_dtype.itemsize + outputs(case), logits)


def outputs(case: ChoiceCase) -> float:
    """Bytes of the ids."""
    return 8 * case.rows


# ----------------------------------------------------------------------------- the sides


def plain(logits: Tensor) -> Tensor:
    """The same in plain torch: -1 where a logit is not finite."""
    return torch.where(logits.isfinite().all(-1), logits.argmax(-1), -1)


def torch_compiled(inputs: Inputs) -> Call:
    """Plain torch, compiled."""
    on_gpu(inputs["logits"], "torch.compile")
    return partial(compiled(plain), inputs["logits"])


def sides(case: ChoiceCase) -> list[Side]:
    """Ours and the peers; argmax by itself does not see what is not finite."""
    return [
        Side(OURS, lambda inputs: partial(find(OURS, "likeliest"), inputs["logits"])),
        Side("torch", lambda inputs: partial(plain, inputs["logits"])),
        Side("torch.compile", torch_compiled),
        Side("argmax alone", lambda inputs: partial(torch.argmax, inputs["logits"], -1)),
    ]


def expected(case: ChoiceCase, inputs: Inputs) -> list[Expected]:
    """All ids, exactly."""
    ids = (inputs["logits"] == LARGEST).double().argmax(-1).double()
    return [Expected("ids", lambda found: found, ids, ids)]


def label(case: ChoiceCase) -> str:
    """As "GLM-4-9B likeliest of 151552"."""
    return f"{case.model} likeliest of {case.vocabulary}"


SUBJECT = Subject(
    "choice", "The likeliest token", all_cases, make_inputs, outputs, work, sides, expected, label,
    lambda case: ("rows", case.rows),
)  # fmt: skip
