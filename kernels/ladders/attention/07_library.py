"""The kernel of the library: also prefixes, padding, packed samples, caches, any strides and heads, and log-sum-exp."""

from glm_kernels import attention as library
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal: q [B, H, T, K], k and v [B, G, T, K]; see `glm_kernels.attention` for the rest."""
    return library(q, k, v)
