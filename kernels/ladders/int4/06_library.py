"""Columns are split until every multiprocessor has work, tiles fit the number of rows, and the layout is made once."""

from glm_kernels import int4_matmul
from torch import Tensor


def int4(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """x [N, D], packed uint8 [F, D / 2], scales [F, groups] -> y [N, F]: glm_kernels/int_matmul.py."""
    return int4_matmul(x, packed, scales, group=x.shape[1] // scales.shape[1])
