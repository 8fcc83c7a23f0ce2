"""Exercises of chapter 5, norms and wiring. Replace what raises, then `python -m docs.check 5`."""

from collections.abc import Callable, Sequence

from torch import Tensor

import glm

Function = Callable[[Tensor], Tensor]  # [..., D] -> [..., D]


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_first: bool) -> Tensor:
    """Exercise 5.1. RMSNorm, in the dtype of `x`, which may be bfloat16.

    x              [..., D]
    weight         [D], in the same dtype
    weight_first   whether the weight is multiplied before the result is rounded to the dtype of `x`, or after that

    Up to that rounding compute in float32 (in float64 where `x` is float64). Returns [..., D].
    """
    raise NotImplementedError


def wired(kind: str, x: Tensor, f: Function, before: Function, after: Function, alpha: float) -> Tensor:
    """Exercise 5.2. The stream behind a sublayer.

    kind            "Pre", "Sandwich", "Deep" or "Scaled"
    x               the stream [B, T, D]
    f               the sublayer
    before, after   the norms in front of it and behind it; not every kind uses both
    alpha           not every kind uses it either

    Returns the new stream [B, T, D].
    """
    raise NotImplementedError


def two_chains(x: Tensor, norms: Sequence[Function], sublayers: Sequence[Function], alpha: float) -> dict[str, Tensor]:
    """Exercise 5.3. The states of DeepNorm, cut in both ways.

    x           what comes in [T, D]
    norms       N + 1 of them
    sublayers   N

    Returns {"scaled": …, "deep": …}, both [N + 1, T, D]. scaled[0] is x; deep[0] is what `Deep` has to begin with so
    that it computes the same as `Scaled`; scaled[k] and deep[k] are the streams behind k sublayers. Only the first N
    norms belong to the chain `Scaled`: norms[N] is its final norm.
    """
    raise NotImplementedError


def which_field(right: glm.GLM, broken: Callable[[Tensor], Tensor], ids: Tensor) -> str:
    """Exercise 5.4. A small ChatGLM, three blocks deep, is wrong in one field. Which?

    right    the model as it should be: its spec and its weights are there to be used
    broken   the same weights under another spec, to be called with ids [B, T] for logits [B, T, V]
    ids      [B, T] to begin with

    What may have happened: α is that of three layers (√6), in all blocks or in the middle one only; the wiring of all
    blocks is `Pre`; ε is 1e-3 in the norms of all blocks, or in the final norm. Returns the path of the field as
    `glm.diff` names it, such as "final_norm.eps" or, for blocks, "blocks[0:3].norm.eps" and "blocks[1].norm.eps".
    """
    raise NotImplementedError
