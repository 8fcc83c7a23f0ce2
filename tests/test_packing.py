"""Words and the integers in them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from integer_layouts import words

from glm.packing import pack, unpack


@pytest.mark.parametrize("bits", [4, 8])
@given(rows=st.integers(0, 5), columns=st.integers(1, 70), seed=st.integers(0, 1000))
def test_packing_is_the_published_order_and_undone(bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    values = torch.randint(-half, half, (rows, columns), generator=generator, dtype=torch.int8)
    packed = pack(values, bits)
    assert torch.equal(packed, words((values.int() + half).numpy(), bits))
    assert torch.equal(unpack(packed, bits, columns), values)


def test_every_byte_is_unpacked_and_packed_again() -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    for place in range(4):  # each byte value in each place of a word, beside its neighbours
        packed = every.roll(place, dims=1)[place].contiguous().view(torch.int32)[None]
        for bits in (4, 8):
            values = unpack(packed, bits, 256 * 8 // bits)
            assert torch.equal(pack(values, bits), packed)
            codes = [
                int(b) >> shift & (1 << bits) - 1 for b in packed.view(torch.uint8)[0] for shift in range(0, 8, bits)
            ]
            assert (values[0].int() + (1 << (bits - 1))).tolist() == codes


def test_values_in_turned_matrices() -> None:
    values = torch.randint(-8, 8, (16, 24), dtype=torch.int8)
    assert torch.equal(pack(values.T, 4), pack(values.T.contiguous(), 4))
    packed = pack(values, 4)
    assert torch.equal(unpack(packed.T.contiguous().T, 4, 24), values)
