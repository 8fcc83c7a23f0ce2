"""Choosing integers: exact where it can be, never worse than the plain way, safe where there is nothing to scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.errors import ConfigError
from glm.grouped import Grouped, GroupedLinear
from glm.packing import unpack
from glm.quantization import METHODS, dequantize, quantize

FORMS = [Grouped(b, g, s) for b in (4, 8) for g in (32, 64, 128, None) for s in (True, False)]


def normal(outputs: int, inputs: int, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def errors(w: Tensor, form: Grouped, method: str) -> Tensor:
    """Squared error of each group."""
    difference = dequantize(*quantize(w, form, method), form) - w
    return difference.double().square().view(len(w), form.groups(w.shape[1]), -1).sum(-1)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_nearest_is_off_by_half_a_step_at_most(form: Grouped) -> None:
    w = normal(13, 256)
    packed, scales, zeros = quantize(w, form, "nearest")
    assert (zeros is None) == form.symmetric
    step = scales.repeat_interleave(256 // scales.shape[1], dim=1)
    slack = 1 + (0 if form.symmetric else 1)  # a rounded zero point moves the range by up to half a step
    assert ((dequantize(packed, scales, zeros, form) - w).abs() <= slack * step / 2 * (1 + 1e-5)).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_definition_entry_by_entry(form: Grouped) -> None:
    w = normal(5, 128)
    packed, scales, zeros = quantize(w, form)
    q, dense = unpack(packed, form.bits, 128), dequantize(packed, scales, zeros, form, torch.float64)
    size = form.group or 128
    for o in range(5):
        for i in (0, 1, 31, 32, 63, 64, 127):
            z = 0 if zeros is None else int(zeros[o, i // size])
            assert dense[o, i] == float(scales[o, i // size]) * (int(q[o, i]) - z)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_search_is_better_in_every_group(form: Grouped, seed: int) -> None:
    w = normal(16, 256, seed)
    w[3] *= 1e-4
    w[5, 7] = 30.0  # one large number that ruins its group
    searched, plain = errors(w, form, "search"), errors(w, form, "nearest")
    assert (searched <= plain * (1 + 1e-6)).all()
    assert searched.sum() < (0.95 if form.bits == 4 and form.symmetric else 1.0) * plain.sum()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_already_of_this_form_stays(form: Grouped, method: str) -> None:
    generator = torch.Generator().manual_seed(1)
    least, most = -(1 << (form.bits - 1)), (1 << (form.bits - 1)) - 1
    q = torch.randint(0 if form.symmetric else least, most + 1, (6, 128), generator=generator).float()
    q.view(6, form.groups(128), -1)[..., 0] = most  # so that the largest number tells the scale
    if not form.symmetric:
        q.view(6, form.groups(128), -1)[..., 1] = least
    w = q * 0.25  # zero point 0
    assert torch.equal(dequantize(*quantize(w, form, method), form), w)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_rows_and_groups_without_a_scale(dtype: torch.dtype, method: str, symmetric: bool) -> None:
    form = Grouped(4, 32, symmetric)
    w = normal(6, 96).to(dtype)
    w[0] = 0
    w[1, 32:64] = 0
    w[2] = 3.0
    w[3] = -0.5
    w[4] = torch.finfo(dtype).tiny  # its scale may be too small for the dtype
    packed, scales, zeros = quantize(w, form, method)
    dense = dequantize(packed, scales, zeros, form)
    assert scales.dtype == dense.dtype == dtype
    assert dense.isfinite().all()
    assert not dense[0].any()
    assert not dense[1, 32:64].any()
    assert torch.allclose(dense[2:4].double(), w[2:4].double(), rtol=4 * torch.finfo(dtype).eps)
    assert dense[4].abs().max() <= 8 * torch.finfo(dtype).tiny


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    scale=st.floats(1e-6, 1e3),
    seed=st.integers(0, 99),
    symmetric=st.booleans(),
)
def test_scales_are_those_that_are_stored(rows: int, groups: int, scale: float, seed: int, symmetric: bool) -> None:
    form, w = Grouped(4, 32, symmetric), (normal(rows, 32 * groups, seed) * scale).half()
    if not w.isfinite().all():
        return
    made = quantize(w, form, "search")
    assert torch.equal(dequantize(*made, form, torch.float64), dequantize(*quantize(w, form), form, torch.float64))
    # no other integer would be nearer, with the scales as rounded to float16
    dense, step = dequantize(*made, form, torch.float64), made.scales.double().repeat_interleave(32, 1)
    low, high = (
        dequantize(unpack_fill(made.packed, code), made.scales, made.zeros, form, torch.float64) for code in (0, 15)
    )
    off = (dense - w.double()).abs() > step / 2 * (1 + 1e-3)
    assert (~off | (dense == low) | (dense == high)).all()


def unpack_fill(packed: Tensor, code: int) -> Tensor:
    """Words with the same code in every place."""
    word = sum(code << 4 * i for i in range(8))
    return torch.full_like(packed, word - (1 << 32) if word >= 1 << 31 else word)


def test_many_rows_are_worked_on_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    w, form = normal(37, 64), Grouped(4, 32, False)
    whole = quantize(w, form)
    monkeypatch.setattr("glm.quantization.ELEMENTS", 300)
    assert all(torch.equal(a, b) for a, b in zip(quantize(w, form), whole, strict=True))


@pytest.mark.parametrize(
    ("form", "inputs", "says"),
    [
        (
            Grouped(4, 128, True),
            10944,
            "do not divide the 10944 columns of a matrix; 32, 64 or whole rows",
        ),
        (Grouped(4, 64, True), 100, "take whole rows"),
        (Grouped(4, None, True), 100, "do not fill 32-bit words of int4"),
        (Grouped(8, None, True), 99, "do not fill 32-bit words of int8"),
    ],
)
def test_widths_that_do_not_divide(form: Grouped, inputs: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        quantize(torch.ones(2, inputs), form)
    with pytest.raises(ConfigError, match=says):
        form.linear(inputs, 2, bias=False)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_the_module_computes_with_the_dequantised_weight(form: Grouped, bias: bool) -> None:
    w, x = normal(24, 128), normal(3, 128, 1).double()
    module = form.linear(128, 24, bias)
    assert isinstance(module, GroupedLinear)
    packed, scales, zeros = quantize(w, form)
    module.weight_packed, module.weight_scale, module.weight_zero_point = packed, scales, zeros
    if module.bias is not None:
        torch.nn.init.normal_(module.bias.data)
    offset = module.bias.double() if module.bias is not None else 0
    module = module.double()
    expected = x @ dequantize(packed, scales.double(), zeros, form).T + offset
    assert torch.allclose(module(x), expected, rtol=1e-12, atol=1e-12)
    names = {"weight_packed", "weight_scale", *(() if form.symmetric else ("weight_zero_point",))}
    assert module.state_dict().keys() == names | ({"bias"} if bias else set())


@pytest.mark.parametrize("form", [Grouped(4, 32, False), Grouped(8, None, True)], ids=str)
def test_each_layer_of_a_stack_is_a_layer(form: Grouped) -> None:
    stack = form.stack(3, 64, 8, bias=True)
    layers = [form.linear(64, 8, bias=True) for _ in range(3)]
    for e, layer in enumerate(layers):
        packed, scales, zeros = quantize(normal(8, 64, e), form)
        for name, x in (("packed", packed), ("scale", scales), ("zero_point", zeros)):
            if x is not None:
                layer.get_buffer(f"weight_{name}").copy_(x)
                stack.get_buffer(f"weight_{name}")[e] = x
        torch.nn.init.normal_(layer.get_parameter("bias").data)
        stack.get_parameter("bias").data[e] = layer.get_parameter("bias").data
    assert stack.state_dict().keys() == layers[0].state_dict().keys()
    x = normal(5, 64, 9)
    for e, layer in enumerate(layers):
        assert torch.equal(stack(x, e), layer(x))
