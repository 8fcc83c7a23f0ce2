"""Exercises of chapter 12, numerics. Replace what raises, then `python -m docs.check 12`."""

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    """Exercise 12.1. float32 numbers, rounded to those that bfloat16 has, without any bfloat16 tensor.

    x   float32, finite, not too small for bfloat16 to have eight digits. As bits it is sign, 8 of exponent, 23 of
        digits; bfloat16 keeps the upper 16 of these 32 bits. `x.view(torch.int32)` shows them.

    Returns float32 of the same shape: the nearest one; of two equally near, the one whose last bit is 0.
    """
    raise NotImplementedError


def counts_to(dtype: torch.dtype) -> int:
    """Exercise 12.2. The largest n for which all of 0, 1, … n are different numbers in `dtype`, by `torch.finfo`."""
    raise NotImplementedError


def careful_scores(q: Tensor, k: Tensor, layer: int) -> Tensor:
    """Exercise 12.3. Scores as ChatGLM-6B's official code computes them in layer `layer`, counted from 0.

    q, k   float16 [T, K] and [S, K], so large that their products do not fit into float16

    The product itself must be a float16 tensor. Returns q kᵀ / √K, [T, S], in float32.
    """
    raise NotImplementedError


def judged(kernel: Tensor, plain: Tensor, exact: Tensor) -> bool:
    """Exercise 12.4. Whether a kernel keeps to the rule: at most twice torch's error, or twice half a rounding.

    kernel   what is judged, in its dtype
    plain    what torch computes in that dtype
    exact    the same in float64

    The errors are compared in two norms, the largest element and the root of the sum of squares; half a rounding is
    half of the dtype's eps times that norm of `exact`. Both norms must keep to it, and a NaN keeps to nothing.
    """
    raise NotImplementedError
