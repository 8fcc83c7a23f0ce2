"""glm/positions.py: rotations by hand, what they leave alone, and how they are stretched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from glm.errors import LayoutError
from glm.positions import PAIRINGS, Interpolation, Learned, Plain, Rotary, Unturned, Yarn

steady = settings(derandomize=True, deadline=None, max_examples=40)
WIDTHS = [(8,), (4,), (2,), (4, 4), (4, 2)]
shapes = st.tuples(st.sampled_from(WIDTHS), st.sampled_from(sorted(PAIRINGS)))
HEAD = 8


def rotary(widths: tuple[int, ...] = (HEAD,), pairing: str = "halves", **changes: object) -> Rotary:
    values = {"base": 100.0, "scaling": Plain(), "rounding": None} | changes
    return Rotary(widths=widths, pairing=pairing, **values)  # type: ignore[arg-type]


def turned(rotary: Rotary, x: Tensor, *position: int) -> Tensor:
    """One vector of channels [K], turned for one position."""
    return rotary.rotation(torch.tensor([[position]]), x.dtype)(x[None, None, None])[0, 0, 0]


def channels(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(HEAD, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@steady
@given(shapes, st.lists(st.integers(0, 3000), min_size=2, max_size=2))
def test_turns_by_hand(shape: tuple[tuple[int, ...], str], places: list[int]) -> None:
    widths, pairing = shape
    x, before = channels(0), 0
    y = turned(rotary(widths, pairing), x, *places[: len(widths)])
    for width, place in zip(widths, places, strict=False):
        for i in range(width // 2):
            first, second = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + width // 2)
            angle = place * 100.0 ** (-2 * i / width)
            a, b = x[before + first], x[before + second]
            assert y[before + first] == pytest.approx(float(a * math.cos(angle) - b * math.sin(angle)), abs=1e-9)
            assert y[before + second] == pytest.approx(float(a * math.sin(angle) + b * math.cos(angle)), abs=1e-9)
        before += width
    assert torch.equal(y[before:], x[before:])  # channels of no axis are left alone


@steady
@given(shapes, st.lists(st.integers(0, 500), min_size=6, max_size=6))
def test_scores_depend_on_differences_only(shape: tuple[tuple[int, ...], str], p: list[int]) -> None:
    turn, n = rotary(*shape), len(shape[0])
    q, k = channels(1), channels(2)
    here = turned(turn, q, *p[0:n]) @ turned(turn, k, *p[2 : 2 + n])
    shifted = (
        [at + by for at, by in zip(p[0:n], p[4:6], strict=False)],
        [at + by for at, by in zip(p[2 : 2 + n], p[4:6], strict=False)],
    )
    there = turned(turn, q, *shifted[0]) @ turned(turn, k, *shifted[1])
    torch.testing.assert_close(here, there, rtol=0, atol=1e-9)


@pytest.mark.parametrize("pairing", sorted(PAIRINGS))
def test_pairings_split_and_join(pairing: str) -> None:
    split, join = PAIRINGS[pairing]
    x = torch.arange(16.0).view(2, 8)
    assert torch.equal(join(*split(x)), x)
    assert not torch.equal(*split(x))


def test_the_two_pairings_are_one_permutation_apart() -> None:
    x = channels(3)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = turned(rotary(pairing="interleaved"), x, 5)
    assert torch.equal(interleaved[order], turned(rotary(pairing="halves"), x[order], 5))


@pytest.mark.parametrize("factor", [2.0, 8.0])
def test_interpolation_divides_positions(factor: float) -> None:
    x = channels(4)
    stretched = turned(rotary(scaling=Interpolation(factor)), x, int(40 * factor))
    torch.testing.assert_close(stretched, turned(rotary(), x, 40), rtol=0, atol=1e-12)


def test_yarn_keeps_fast_frequencies_and_interpolates_slow_ones() -> None:
    yarn = Yarn(factor=4.0, original=1024, beta_fast=32.0, beta_slow=1.0, gain=1.25, truncate=False)
    plain = rotary((64,), base=1e4).frequencies(64)
    ratio = rotary((64,), base=1e4, scaling=yarn).frequencies(64) / plain
    turns = 1024 * plain / (2 * math.pi)  # within the original context
    torch.testing.assert_close(ratio[turns >= 32], torch.ones_like(ratio[turns >= 32]), rtol=1e-12, atol=0)
    torch.testing.assert_close(ratio[turns <= 1], torch.full_like(ratio[turns <= 1], 0.25), rtol=1e-12, atol=0)
    between = ratio[(turns < 32) & (turns > 1)]
    assert len(between) > 5
    steps = between.diff()
    torch.testing.assert_close(steps, torch.full_like(steps, float(steps[0])), rtol=1e-9, atol=0)  # linear in i
    assert steps[0] < 0


def ends(truncate: bool) -> tuple[float, float]:
    """Where YaRN's ramp begins and ends, in (fractional) frequencies."""
    plain = rotary((64,), base=1e4).frequencies(64)
    ratio = Yarn(4.0, 1024, 32.0, 1.0, 1.0, truncate).stretch(plain, 1e4) / plain
    slope = float(ratio[11] - ratio[10])
    return 10 + (1 - float(ratio[10])) / slope, 10 + (0.25 - float(ratio[10])) / slope


def test_yarn_truncates_outwards() -> None:
    begin, end = ends(truncate=False)
    assert begin == pytest.approx(64 * math.log(1024 / (32 * 2 * math.pi)) / (2 * math.log(1e4)))
    assert ends(truncate=True) == pytest.approx((math.floor(begin), math.ceil(end)))


def test_yarn_without_a_ramp_is_a_step() -> None:
    plain = rotary((64,), base=1e4).frequencies(64)
    ratio = Yarn(4.0, 1024, 8.0, 8.0, 1.0, truncate=False).stretch(plain, 1e4) / plain
    fast = 1024 * plain / (2 * math.pi) > 8
    torch.testing.assert_close(ratio, torch.where(fast, 1.0, 0.25).double())


def test_gain_multiplies_what_is_turned() -> None:
    yarn = Yarn(1.0, 64, 32.0, 1.0, gain=1.5, truncate=True)  # factor 1: frequencies stay
    x = channels(5)
    y = turned(rotary((4,), scaling=yarn), x, 7)
    torch.testing.assert_close(y[:4], 1.5 * turned(rotary((4,)), x, 7)[:4])
    assert torch.equal(y[4:], x[4:])
    assert Plain().gain == Interpolation(2.0).gain == 1.0


def test_rounded_frequencies() -> None:
    exact = rotary((64,), base=1e4).frequencies(64)
    rounded = rotary((64,), base=1e4, rounding="float16").frequencies(64)
    assert torch.equal(rounded, rounded.half().double())
    assert 1e-5 < float((rounded / exact - 1).abs().max()) < 2**-11
    assert exact.dtype == rounded.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_far_positions_are_exact_in_every_dtype(dtype: torch.dtype) -> None:
    x, place = channels(6, dtype), 999_983  # a float32 angle would be off by up to 0.06 radians, a bfloat16 one by all
    near = turned(rotary(), x.double(), place)
    error = (turned(rotary(), x, place).double() - near).abs().max()
    assert error < 4 * torch.finfo(dtype).eps
    assert turned(rotary(), x, place).dtype == dtype


def test_axes_must_agree() -> None:
    with pytest.raises(LayoutError, match="1 axes"):
        rotary((4, 4)).rotation(torch.zeros(1, 3, 1, dtype=torch.long), torch.float32)
    with pytest.raises(LayoutError, match="2 axes"):
        rotary((8,)).rotation(torch.zeros(1, 3, 2, dtype=torch.long), torch.float32)


# ----------------------------------------------------------------------------- learned tables


def test_learned_positions_are_a_sum_of_rows() -> None:
    module = Learned(5, 2).build(3)
    for table in module.tables:
        torch.nn.init.normal_(table.weight)
    places = torch.tensor([[[0, 4], [3, 1]]])
    first, second = (table.weight for table in module.tables)
    assert torch.equal(module(places), torch.stack((first[0] + second[4], first[3] + second[1]))[None])


@pytest.mark.parametrize(
    ("places", "message"),
    [([[5, 0]], "position 5 is none of the 5"), ([[0, -1]], "position -1"), ([[0]], "1 axes, but the model has 2")],
)
def test_a_position_that_was_not_learnt(places: list[list[int]], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        Learned(5, 2).build(3)(torch.tensor([places]))


def test_unturned_leaves_every_head_alone() -> None:
    x = torch.randn(2, 3, 4, 8)
    assert Unturned().rotation(torch.zeros(2, 3, 2, dtype=torch.long), x.dtype)(x) is x
