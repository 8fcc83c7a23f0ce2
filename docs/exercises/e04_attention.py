"""Exercises of chapter 4, attention. Replace what raises, then `python -m docs.check 4`."""

from torch import Tensor

import glm


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Exercise 4.1. Attention of H query heads that share G key heads, H/G neighbours each.

    q         [B, H, T, K]
    k, v      [B, G, S, K]
    visible   bool [B, T, S], True for what is seen; every query sees something

    Returns [B, H, T, K]. Use nothing but products, sums, exponentials and the like.
    """
    raise NotImplementedError


def step(
    x: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, keys: Tensor, values: Tensor, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 4.2. One token behind a cache, as ChatGLM2 computes it, but for the rotation, which is left out.

    x              the new token's input [B, 1, D]
    qkv, bias      rows of all query heads, then key heads, then value heads: [(H + 2G) K, D] and [(H + 2G) K]
    out            [D, H K]
    keys, values   of the S tokens before, [B, G, S, K]
    heads          H

    Returns the output `y` [B, 1, D], and `keys` and `values` [B, G, S + 1, K] for the next step.
    """
    raise NotImplementedError


def flat_rows(rows: Tensor, heads: int) -> Tensor:
    """Exercise 4.3. The rows of a query_key_value matrix of ChatGLM-6B's files in the order of ChatGLM2's.

    rows    [3 H K, D]: q, k and v of the first head, q, k and v of the second …
    heads   H

    Returns [3 H K, D]: q of all heads, k of all heads, v of all heads.
    """
    raise NotImplementedError


def equal_length(spec: glm.Spec) -> int:
    """Exercise 4.4. How many tokens, in all rows of a batch, have a cache of at least the bytes of the weights.

    spec   a model whose blocks all have `glm.attention.Attention`, and a head of its own (`tied` is False)

    Count all parameters, in as many bytes each as a number of the cache. `glm.info.parameters(spec)` counts them.
    Returns the smallest such number of tokens.
    """
    raise NotImplementedError
