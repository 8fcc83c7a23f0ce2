"""The published layouts of integer matrices, written down once more: loops over bits, sharing nothing with the package.

Every function takes the codes u [O, I], 0 ≤ u < 2^bits, zero points [O, groups] likewise, and scales [O, groups].
"""

import numpy as np
import torch
from torch import Tensor

PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: the column in a word's lowest nibble, in the next, …


def dequantized(u: Tensor, z: Tensor, s: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """W[o, i] = s[o, g] (u[o, i] - z[o, g])."""
    each = u.shape[1] // s.shape[1]
    group = torch.arange(u.shape[1]) // each
    return s[:, group].to(dtype) * (u.to(dtype) - z[:, group].to(dtype))


def words(rows: np.ndarray, bits: int, places: tuple[int, ...] | None = None) -> Tensor:
    """[n, m] codes -> [n, ⌈m bits / 32⌉] int32, column `places[p]` of every word's columns in its place p."""
    per = 32 // bits
    places = places or tuple(range(per))
    out = np.zeros((rows.shape[0], -(-rows.shape[1] // per)), dtype=np.uint32)
    for word in range(out.shape[1]):
        for p, column in enumerate(places):
            if word * per + column < rows.shape[1]:
                out[:, word] |= rows[:, word * per + column].astype(np.uint32) << np.uint32(bits * p)
    return torch.from_numpy(out.view(np.int32).copy())


def gptq(u: Tensor, z: Tensor, s: Tensor, bits: int, version: int) -> dict[str, Tensor]:
    """GPTQ: words along the inputs; the first version stores each zero point less one."""
    inputs, groups = u.shape[1], s.shape[1]
    stored = (z.numpy().astype(np.int64) - (version == 1)) % (1 << bits)
    return {
        "qweight": words(u.numpy(), bits).T.contiguous(),
        "qzeros": words(stored.T, bits),
        "scales": s.T.contiguous(),
        "g_idx": torch.tensor([i // (inputs // groups) for i in range(inputs)], dtype=torch.int32),
    }


def awq(u: Tensor, z: Tensor, s: Tensor) -> dict[str, Tensor]:
    """AWQ: words along the outputs, their columns out of order."""
    return {
        "qweight": words(u.numpy().T, 4, PLACES),
        "qzeros": words(z.numpy().T, 4, PLACES),
        "scales": s.T.contiguous(),
    }


def pack_quantized(u: Tensor, z: Tensor | None, s: Tensor, bits: int) -> dict[str, Tensor]:
    """compressed-tensors: words along the inputs, zero points along the outputs."""
    tensors = {
        "weight_packed": words(u.numpy(), bits),
        "weight_scale": s,
        "weight_shape": torch.tensor(u.shape),
    }
    return tensors if z is None else {**tensors, "weight_zero_point": words(z.numpy().T, bits).T.contiguous()}
