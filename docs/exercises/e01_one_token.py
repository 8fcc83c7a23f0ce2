"""Exercises of chapter 1, one token. Replace what raises, then `python -m docs.check 1`.

A trace is a mapping from names to tensors: `trace["block 0 / attention / q"]`. The chapter prints the names.
"""

from torch import Tensor

import glm
from glm.tracing import Trace


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 1.1. Attention, from queries, keys and values to what the heads answer.

    q        [B, H, T, K]
    k, v     [B, G, S, K], G heads that divide H: query head h asks key head h // (H / G)
    visible  bool [B, T, S]

    Return scores [B, H, T, S] before the mask, probabilities [B, H, T, S], and heads [B, H, T, K].
    """
    raise NotImplementedError


def contributions(trace: Trace) -> Tensor:
    """Exercise 1.2. What the last stream of a model with pre-norms, x + f(n(x)), is the sum of.

    Return [1 + 2 L, B, T, D]: the stream before the first block, then what each sublayer added to it, in order.
    """
    raise NotImplementedError


def lens(model: glm.GLM, stream: Tensor) -> Tensor:
    """Exercise 1.3. The probabilities of the next token [B, T, V], as if `stream` [B, T, D] were the last one.

    `model.final_norm` and `model.head` are what stands behind the last block.
    """
    raise NotImplementedError


def first_difference(one: Trace, other: Trace) -> str | None:
    """Exercise 1.4. The name of the first step in which two passes of the same ids differ; None if there is none.

    Both have the same steps in the same order. Two tensors that are NaN at the same places, and equal elsewhere, do
    not differ: `torch.equal` says they do.
    """
    raise NotImplementedError


def broken_field(sound: Trace, broken: Trace) -> str:
    """Exercise 1.5. The same weights and ids were run by two models that differ in one field of their specs: which?

    One of "rotary.base", "rotary.pairing", "norm.eps" (of all blocks), "wiring.alpha" (of all blocks),
    "feed_forward.branches" (of all blocks), "final_norm.eps".
    """
    raise NotImplementedError
