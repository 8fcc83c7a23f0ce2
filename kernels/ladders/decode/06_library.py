"""The last program of a row joins the splits in the same launch, and shapes, splits and stages fit the device."""

import glm_kernels
from torch import Tensor


def decode(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """q [B, H, 1, K], k and v [B, G, S, K], length [B]: glm_kernels/decode.py, with any strides and K."""
    return glm_kernels.decode_attention(q, k, v, length)
