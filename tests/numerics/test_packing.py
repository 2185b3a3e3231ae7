import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.packing import pack_codes, packed_columns, unpack_codes

widths = st.sampled_from(WIDTHS)


def naive_pack(row, bits):
    """One bit at a time."""
    stream = [value >> bit & 1 for value in row for bit in range(bits)]
    stream += [0] * (-len(stream) % 8)
    bytes_ = [stream[i : i + 8] for i in range(0, len(stream), 8)]
    return [sum(bit << i for i, bit in enumerate(byte)) for byte in bytes_]


@given(st.integers(1, 9), st.integers(1, 33), widths)
def test_packing_agrees_with_a_loop_over_bits_and_unpacking_undoes_it(rows, columns, bits):
    q = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    packed = pack_codes(q, bits)
    assert packed.shape == (rows, packed_columns(columns, bits))
    assert packed.tolist() == [naive_pack(row, bits) for row in q.tolist()]
    assert torch.equal(unpack_codes(packed, columns, bits), q)
    across = packed.T.contiguous().T  # column by column in memory
    assert torch.equal(unpack_codes(across, columns, bits), q)


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_takes_exactly_its_bits_rounded_up_to_a_byte(bits):
    assert packed_columns(1024, bits) == 128 * bits
    assert packed_columns(1, bits) == 1
