"""GPTQ against what it promises: the same as rounding where inputs are unrelated, better output where they are not."""

import pytest
import torch
from torch import Tensor

from glm.errors import GLMError
from glm.gptq import gptq, inverse_root
from glm.grouped import Grouped, dequantize
from glm.quantization import quantize

FORMS = [Grouped(4, 32, True), Grouped(4, None, False), Grouped(8, 64, True)]


def related(tokens: int, inputs: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions explain most, and a few channels are loud."""
    generator = torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, inputs, generator=generator)
    x = few + 0.3 * torch.randn(tokens, inputs, generator=generator)
    x[:, ::17] *= 8
    return x


def output_error(x: Tensor, w: Tensor, dense: Tensor) -> float:
    return float((x @ (dense - w).T).norm() / (x @ w.T).norm())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_output_is_nearer(form: Grouped) -> None:
    w = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    x, unseen = related(600, 128).split([400, 200])
    made = dequantize(*gptq(w, x.T @ x, form), form)
    searched = dequantize(*quantize(w, form), form)
    assert output_error(unseen, w, made) < 0.7 * output_error(unseen, w, searched)
    assert torch.allclose(made, dequantize(*gptq(w, 8.0 * (x.T @ x), form), form))  # moments of any scale


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_unrelated_inputs_leave_nothing_to_make_up_for(form: Grouped) -> None:
    w = torch.randn(8, 128, generator=torch.Generator().manual_seed(2))
    for a, b in zip(gptq(w, 4.0 * torch.eye(128), form), quantize(w, form), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_the_error_of_a_column_is_passed_on_as_the_least_squares_say() -> None:
    """One column rounded: the others move to where the output error is least, which normal equations find directly."""
    H = (lambda x: x.T @ x)(related(300, 8).double())
    U = inverse_root(H)
    damped = torch.linalg.inv(U.T @ U)
    e = 0.37
    moved = -e * U[0, 1:] / U[0, 0]
    # minimise d H d over the free part of d = (-e, moved): H_ff moved = e H_f0
    assert torch.allclose(moved, e * torch.linalg.solve(damped[1:, 1:], damped[1:, 0]), rtol=1e-9)


def test_text_that_is_silent_in_some_directions_or_all() -> None:
    w, form = torch.randn(4, 64), Grouped(4, 32, True)
    x = related(5, 64)
    x[:, 40:] = 0
    for H in (x.T @ x, torch.zeros(64, 64)):
        assert dequantize(*gptq(w, H, form), form).isfinite().all()
    with pytest.raises(GLMError, match="second moments"):
        gptq(w, -1e9 * torch.eye(64), form)
