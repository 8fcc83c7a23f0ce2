"""The product with a matrix of int4 or int8 weights: y = x Wᵀ + b, W never written out.

    W[o, i] = s[o, g] (q[o, i] - z[o, g])        g = i // group,  -2^(bits-1) ≤ q < 2^(bits-1)
    y[n, o] = Σ_i x[n, i] W[o, i] + b[o]
    swiglu:   y = silu(g) u, with g and u the first and the second half of x Wᵀ + b    (arXiv:2002.05202)
    residual: y = r + …
    norm:     x ⊙ norm / sqrt(mean x² + eps) in the place of x, the RMSNorm before the product    (arXiv:1910.07467)

Bytes of N rows: O I bits / 8 of integers, (2 to 4) O I / group of scales, 2 N (I + O) of x and y. Flops: 2 N O I. With
one row that is 4 flops a byte for int4 and 2 for int8, and memory is the bound; on a Hopper GPU it is until about 45
rows for int4 and 90 for int8.

Layout: x [..., I], its rows at any one stride; the matrix as stored, codes q + 2^(bits-1), one to a byte for int8 and
two for int4, the even column in the low nibble; or as `int4_prepack` and `int8_prepack` lay it out for the kernel once
and for all: see `packing.py`. A stored matrix is laid out anew at every call. The kernel takes float16 and bfloat16,
groups that are multiples of 32 or a whole row; the reference takes the rest. On the CPU torch's own operator for packed
integers computes the plain product where it fits. There are no gradients. The kernel is in `packed_matmul.py`.

Rounding with `norm`. The reference takes the norm in float32, with its weight before the cast as
`rms_norm(…, weight_first=True)` does, and rounds once to the dtype of x. The kernel rounds x ⊙ norm once and scales the
product, in float32 still, by 1 / sqrt(mean x² + eps) before the bias: as many roundings, elsewhere. So what it rounds
is not normalised yet. In float16 that is infinite from |x norm| = 65520 on, where the reference is not, and has fewer
digits below 2⁻¹⁴ ≈ 6·10⁻⁵: take `rms_norm` first where a model's activations go so far. bfloat16 has the range of
float32. Every block of outputs weights its rows and sums their squares anew, which `rms_norm` does once: what is saved
is a launch, and writing and reading x, 4 N I bytes.
"""

from torch import Tensor

from glm_kernels.packed_matmul import multiply, reference
from glm_kernels.packing import Prepacked, prepack


def int4_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int, bias: Tensor | None = None,
    residual: Tensor | None = None, swiglu: bool = False, norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """y = x Wᵀ + bias, see the top of this file.

    Args:
        x: [..., I].
        packed: uint8 [O, I / 2] or int32 [O, I / 8] as stored; or int16 [tiles, O, 32], and then scales and zeros
            as `int4_prepack` gave them too.
        scales: [O, I / group], in any floating-point dtype.
        zeros: int8 [O, I / group], on the scale of the signed integers; None is 0.
        group: Columns that share a scale; I for a whole row.
        bias: [O], in the dtype of x.
        residual: [..., O], or of half the width with `swiglu`; added at the end.
        swiglu: The first half of the outputs is the gate of the second.
        norm: [I], in the dtype of x: the weight of an RMSNorm of x before the product.
        eps: Added to that norm's mean square; given with `norm` only.

    Returns:
        y [..., O], or [..., O / 2] with `swiglu`, contiguous and in the dtype of x.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    return multiply(x, packed, scales, zeros, bias, residual, norm, eps, None, 4, group, swiglu)


def int8_matmul(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int, bias: Tensor | None = None,
    residual: Tensor | None = None, swiglu: bool = False, norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`int4_matmul` with int8: packed is uint8 [O, I] or int32 [O, I / 4], or as `int8_prepack` gave it."""
    return multiply(x, packed, scales, zeros, bias, residual, norm, eps, None, 8, group, swiglu)


def int4_matmul_reference(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int, bias: Tensor | None = None,
    residual: Tensor | None = None, swiglu: bool = False, norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`int4_matmul` in plain torch: the matrix is written out in the dtype of x."""
    return reference(x, packed, scales, zeros, bias, residual, norm, eps, None, 4, swiglu)


def int8_matmul_reference(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, group: int, bias: Tensor | None = None,
    residual: Tensor | None = None, swiglu: bool = False, norm: Tensor | None = None, eps: float | None = None,
) -> Tensor:  # fmt: skip
    """`int8_matmul` in plain torch: the matrix is written out in the dtype of x."""
    return reference(x, packed, scales, zeros, bias, residual, norm, eps, None, 8, swiglu)


def int4_matmul_experts(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, offsets: Tensor, group: int,
    bias: Tensor | None = None, swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """The same with a matrix for each expert: rows offsets[e] to offsets[e + 1] of x are multiplied with matrix e.

    Args:
        x: [N, I], sorted by expert.
        packed, scales, zeros, bias: As for `int4_matmul`, with an axis of E experts in front.
        offsets: int32 [E + 1] on the device, from 0 to N: where each expert's rows begin.
        group: Columns that share a scale; I for a whole row.
        swiglu: The first half of the outputs is the gate of the second.

    Returns:
        y [N, O], or [N, O / 2] with `swiglu`.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit.
    """
    return multiply(x, packed, scales, zeros, bias, None, None, None, offsets, 4, group, swiglu)


def int8_matmul_experts(
    x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None = None, *, offsets: Tensor, group: int,
    bias: Tensor | None = None, swiglu: bool = False,
) -> Tensor:  # fmt: skip
    """`int4_matmul_experts` with int8: packed, scales, zeros and bias as for `int8_matmul`, with an axis in front."""
    return multiply(x, packed, scales, zeros, bias, None, None, None, offsets, 8, group, swiglu)


def int4_prepack(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Prepacked:
    """A stored int4 matrix in the kernel's layout, for `int4_matmul(x, *prepacked, group=group)`."""
    return prepack(packed, scales, zeros, bits=4)


def int8_prepack(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Prepacked:
    """A stored int8 matrix in the kernel's layout, for `int8_matmul(x, *prepacked, group=group)`."""
    return prepack(packed, scales, zeros, bits=8)
