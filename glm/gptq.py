"""GPTQ: integers that give the least error of a layer's output, chosen column by column.

For inputs x and H = E[x xᵀ] the expected squared error of a row w's output is (w - ŵ) H (w - ŵ)ᵀ. Round one column; the
best that the columns not yet rounded can do about its error e is w ← w - e U_j / U_jj, with UᵀU = H⁻¹ and U upper
triangular (Frantar et al. 2022, arXiv:2210.17323). Columns go by falling H_jj: the loudest first, while there is most
left to make up for them. But a group is always of neighbouring columns, and its scale is chosen beforehand, by the
weighted search of `quantization.py`: so the result is stored like any other.
"""

from typing import Final

import torch
from torch import Tensor

from glm.errors import GLMError
from glm.grouped import Grouped
from glm.packing import pack
from glm.quantization import Integers, Range, nearest_integers, search

DAMPING: Final = 0.01  # of the mean of H's diagonal, added to it: text never fills all directions
STEP: Final = 128  # columns whose errors are passed on together
ELEMENTS: Final = 1 << 23  # worked on at a time: a step of the loop over columns costs much the same for any few rows


def gptq(weight: Tensor, hessian: Tensor, form: Grouped, scale_dtype: torch.dtype | None = None) -> Integers:
    """The weight [O, I] as integers, for inputs with second moments `hessian` [I, I] (of any scale).

    Raises ConfigError where the groups do not divide a row, GLMError where `hessian` is no matrix of moments.
    """
    dtype = scale_dtype or weight.dtype
    groups = form.groups(weight.shape[-1])
    size = weight.shape[-1] // groups
    order = hessian.diagonal().argsort(descending=True, stable=True)
    U = inverse_root(hessian[order][:, order])
    importance = hessian.diagonal().to(U.dtype).view(groups, size)
    parts = []
    for rows in weight.split(max(1, ELEMENTS // weight.shape[-1])):
        w = rows.to(U.dtype)
        chosen = search(w.view(len(w), groups, size), form, dtype, importance)
        q = torch.empty(w.shape, dtype=torch.int8, device=w.device)
        q[:, order] = rounded(w[:, order], U, each_column(chosen, order // size), form)
        parts.append((pack(q, form.bits), chosen.scales[..., 0].to(dtype), chosen.zeros[..., 0]))
    packed, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return Integers(packed, scales, None if form.symmetric else zeros.to(torch.int8))


def each_column(chosen: Range, group: Tensor) -> Range:
    """Scales and zero points [R, I] of columns that belong to the groups `group` [I]."""
    return Range(chosen.scales[:, group, 0], chosen.zeros[:, group, 0])


def rounded(w: Tensor, U: Tensor, chosen: Range, form: Grouped) -> Tensor:
    """Integers int8 [R, I] for w [R, I], each column's error made up for by those after it."""
    w, scales, zeros = (x.T.contiguous().clone() for x in (w, *chosen))  # [I R]: a column is one stroke of memory
    q = torch.empty_like(w, dtype=torch.int8)
    for start in range(0, len(w), STEP):
        end = min(start + STEP, len(w))
        errors = torch.empty_like(w[start:end])
        for j in range(start, end):
            q[j] = integers = nearest_integers(w[j], Range(scales[j], zeros[j]), form)
            errors[j - start] = (w[j] - scales[j] * (integers - zeros[j])) / U[j, j]
            w[j + 1 : end].addr_(U[j, j + 1 : end], errors[j - start], alpha=-1)
        w[end:].addmm_(U[start:end, end:].T, errors, alpha=-1)
    return q.T


def inverse_root(hessian: Tensor) -> Tensor:
    """U, upper triangular, with UᵀU = (H + damping)⁻¹; in float32 at least."""
    H = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    mean = H.diagonal().mean()
    damping = DAMPING * mean if bool(mean > 0) else torch.ones_like(mean)
    for _ in range(5):
        L, failed = torch.linalg.cholesky_ex(H + torch.eye(len(H), dtype=H.dtype, device=H.device) * damping)
        if not bool(failed):
            U, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(L), upper=True)
            if not bool(failed):
                root: Tensor = U
                return root
        damping = damping * 10
    raise GLMError("the inputs of a layer have no second moments that can be inverted; take other calibration text")
