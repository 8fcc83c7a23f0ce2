"""Small integers side by side in 32-bit words.

    word = Σ_i (q_i + 2^(bits-1)) · 2^(bits · i)        the first integer in the lowest bits, none across two words

That is the order of compressed-tensors' pack-quantized layout and, turned on its side, of GPTQ. A row whose integers do
not fill its last word leaves the word's upper bits 0.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(values: Tensor, bits: int) -> Tensor:
    """int8 [..., n], each -2^(bits-1) to 2^(bits-1) - 1 with bits 4 or 8 -> int32 words [..., ⌈n · bits / 32⌉]."""
    codes = values.view(torch.uint8) + (1 << (bits - 1)) & (1 << bits) - 1  # bytes wrap, as they should
    codes = F.pad(codes, (0, -codes.shape[-1] % (32 // bits)))
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    flat = codes.reshape(-1).view(torch.int32)  # a single row may have any stride, which a view of it would not like
    return flat.view(*codes.shape[:-1], codes.shape[-1] // 4)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 words -> the int8 [..., count] that `pack` made them of."""
    codes = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], words.shape[-1] * 4)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    return (codes - (1 << (bits - 1))).view(torch.int8)[..., :count]
