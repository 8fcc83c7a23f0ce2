"""Solutions of chapter 12, right and wrong."""

import torch
from torch import Tensor


def rounded(x: Tensor) -> Tensor:
    bits = x.view(torch.int32)
    up = 0x7FFF + ((bits >> 16) & 1)
    return ((bits + up) >> 16 << 16).view(torch.float32)


def rounded_down(x: Tensor) -> Tensor:
    return (x.view(torch.int32) >> 16 << 16).view(torch.float32)


def rounded_half_up(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x8000) >> 16 << 16).view(torch.float32)


def counts_to(dtype: torch.dtype) -> int:
    return round(2 / torch.finfo(dtype).eps)


def counts_to_largest(dtype: torch.dtype) -> int:
    return int(torch.finfo(dtype).max)


def counts_to_half(dtype: torch.dtype) -> int:
    return round(1 / torch.finfo(dtype).eps)


def careful_scores(q: Tensor, k: Tensor, layer: int) -> Tensor:
    return ((q / (q.shape[1] ** 0.5 * (layer + 1))) @ k.T).float() * (layer + 1)


def careless_scores(q: Tensor, k: Tensor, layer: int) -> Tensor:
    return (q @ k.T).float() / q.shape[1] ** 0.5


def scores_of_the_layer_before(q: Tensor, k: Tensor, layer: int) -> Tensor:
    return ((q / (q.shape[1] ** 0.5 * (layer + 1))) @ k.T).float() * layer


def scores_widened_too_late(q: Tensor, k: Tensor, layer: int) -> Tensor:
    return (((q / (q.shape[1] ** 0.5 * (layer + 1))) @ k.T) * (layer + 1)).float()


def judged(kernel: Tensor, plain: Tensor, exact: Tensor) -> bool:
    for size in (lambda x: x.abs().max(), lambda x: x.square().sum().sqrt()):
        half = torch.finfo(kernel.dtype).eps / 2 * size(exact)
        if not size(kernel.double() - exact) <= 2 * max(size(plain.double() - exact), half):
            return False
    return True


def judged_by_allclose(kernel: Tensor, plain: Tensor, exact: Tensor) -> bool:
    return torch.allclose(kernel.double(), exact, atol=1e-2, rtol=1e-2)


def judged_in_the_mean(kernel: Tensor, plain: Tensor, exact: Tensor) -> bool:
    return bool((kernel - exact).square().mean() <= 2 * (plain - exact).square().mean())


def judged_without_half_a_rounding(kernel: Tensor, plain: Tensor, exact: Tensor) -> bool:
    return all(
        bool(torch.linalg.vector_norm(kernel - exact, n) <= 2 * torch.linalg.vector_norm(plain - exact, n))
        for n in (2, torch.inf)
    )


RIGHT = {"12.1": [rounded], "12.2": [counts_to], "12.3": [careful_scores], "12.4": [judged]}
WRONG = {
    "12.1": [(rounded_down, "result"), (rounded_half_up, "result")],
    "12.2": [(counts_to_largest, "result"), (counts_to_half, "result")],
    "12.3": [
        (careless_scores, "result"),
        (scores_of_the_layer_before, "result"),
        (scores_widened_too_late, "result"),
    ],
    "12.4": [
        (judged_by_allclose, "result"),
        (judged_in_the_mean, "result"),
        (judged_without_half_a_rounding, "result"),
    ],
}
