"""Rounding weights in C++, group by group: see csrc/rounding.h.

In torch each step of the search is a pass over memory; here a group stays in the nearest cache
until its range is found. `fxquant.algorithms.rtn` is the same algorithm in torch, and explains it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native
from fxquant.numerics.code_books import CODE_BITS, CODE_BOOKS, number_of
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import quantize_weight


def unsupported(weight: Tensor) -> str | None:
    """Why `round_groups` cannot take a weight, or None."""
    if weight.device.type != "cpu":
        return f"it runs on CPUs, not on {weight.device.type}"
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        return f"the weight is a {weight.layout} {type(weight).__name__}, whose memory is its own"
    if weight.is_neg():
        return "the weight is a view that negates"
    if weight.dtype not in FLOAT_TYPES:
        return f"the weight is {weight.dtype}, not one of {', '.join(map(str, FLOAT_TYPES))}"
    return FAULT


def round_groups(
    weight: Tensor,
    made: QuantizedWeight,
    *,
    clip_ratios: Sequence[float],
    refits: int,
    integer_zero_points: bool = False,
    importance: Tensor | None = None,
) -> None:
    """Round a weight with the best range that is tried for each group.

    The result does not depend on the number of threads, nor on the CPU's instructions.

    Args:
        weight: finite, [out, in], of a type for which `unsupported` is None.
        made: contiguous memory for the result, which says its form; see `QuantizedWeight.empty`.
        clip_ratios: of each group's full range, at most 64; one below 0 turns the scale's sign.
        refits: at most so many refits by least squares.
        integer_zero_points: zero points are levels.
        importance: float32 [in] on the CPU, how much a column's squared error counts.
    """
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    if importance is not None:
        importance = importance.contiguous()
    _native.round_groups(
        weight.data_ptr(),
        FLOAT_TYPES[weight.dtype],
        rows,
        columns,
        min(made.group_size, columns),
        made.bits,
        number_of(made.code_book),
        made.symmetric,
        integer_zero_points,
        0 if importance is None else importance.data_ptr(),
        tuple(clip_ratios),
        refits,
        made.packed.data_ptr(),
        made.scales.data_ptr(),
        made.zero_points.data_ptr(),
        torch.get_num_threads(),
    )


def self_test() -> str | None:
    """Round a small weight: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    weight = torch.arange(5 * 70, dtype=torch.float32, device="cpu").sin().view(5, 70)
    forms: list[tuple[int, bool, str | None]] = [(3, True, None), (3, False, None)]
    forms += [(4, True, None), (4, False, None), *((CODE_BITS, True, b) for b in CODE_BOOKS)]
    for bits, symmetric, book in forms:
        plain = quantize_weight(weight, bits, 32, symmetric, code_book=book)
        found = QuantizedWeight.empty(
            weight, bits=bits, group_size=32, symmetric=symmetric, code_book=book
        )
        round_groups(weight, found, clip_ratios=(1.0, 0.9), refits=1)
        full, best = (made.dequantize() - weight for made in (plain, found))
        if not best.norm() <= full.norm() * 1.0001:
            return f"it rounds wrongly on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = self_test()
