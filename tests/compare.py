"""Outputs compared: values, structure and dtypes."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float64: 1e-8}
DEFAULT_TOLERANCE = 1e-4  # of the largest magnitude: fused ops add in another order
# Instruction sets that multiply float activations as bfloat16.
BFLOAT16_SETS = {"amx", "avx512_bf16"}
FEW = 8  # elements: one number alone has no signal-to-noise ratio that means anything


def assert_same(found: object, expected: object, *, bits: bool = False, at: str = "out") -> None:
    """Fail unless `found` has the structure, dtypes and values (or even bits) of `expected`.

    Named outputs may come in another class, if they have the same names in the same order.
    """
    names = named(expected)
    if isinstance(expected, Tensor):
        _assert_same_tensor(found, expected, bits, at)
    elif names is not None:
        others = named(found)
        assert others is not None, f"{at}: {type(found).__name__} has no names {list(names)}"
        assert list(others) == list(names), f"{at}: {list(others)} instead of {list(names)}"
        for name in names:
            assert_same(others[name], names[name], bits=bits, at=f"{at}.{name}")
    elif isinstance(expected, list | tuple):
        kind = tuple if isinstance(expected, tuple) else list
        assert isinstance(found, kind), f"{at}: {type(found).__name__}, not {kind.__name__}"
        assert len(found) == len(expected), f"{at}: {len(found)} values, not {len(expected)}"
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, bits=bits, at=f"{at}[{i}]")
    elif hasattr(expected, "__dict__"):
        assert type(found) is type(expected), f"{at}: {type(found).__name__}"
        for name, value in vars(expected).items():
            assert_same(getattr(found, name), value, bits=bits, at=f"{at}.{name}")
    else:
        assert type(found) is type(expected), f"{at}: {found!r} instead of {expected!r}"
        assert found == expected, f"{at}: {found!r} instead of {expected!r}"


def named(value: object) -> dict[str, Any] | None:
    """The names and values of a mapping, a dataclass or a named tuple; None for anything else."""
    if isinstance(value, Mapping):
        return dict(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return None


def _assert_same_tensor(found: object, expected: Tensor, bits: bool, at: str) -> None:
    assert isinstance(found, Tensor), f"{at}: {type(found).__name__} instead of a tensor"
    assert found.dtype == expected.dtype, f"{at}: {found.dtype} instead of {expected.dtype}"
    assert found.shape == expected.shape, f"{at}: {list(found.shape)} not {list(expected.shape)}"
    if bits or not (expected.is_floating_point() or expected.is_complex()):
        same = torch.equal(torch.nan_to_num(found), torch.nan_to_num(expected))
        assert same, f"{at}: other values, {sqnr(expected, found):.1f} dB"
        return
    finite = torch.isfinite(expected)
    assert torch.equal(torch.isfinite(found), finite), f"{at}: other places are not finite"
    if finite.any():
        a, b = found[finite], expected[finite]
        limit = TOLERANCE.get(expected.dtype, DEFAULT_TOLERANCE) * b.abs().max().clamp(min=1e-6)
        worst = (a - b).abs().max()
        assert worst <= limit, f"{at}: off by {worst:.3g}, {sqnr(expected, found):.1f} dB"


def sqnr(expected: Tensor, found: Tensor) -> float:
    """10 log10 of signal over noise, in float64, where finite."""
    a, b = (torch.view_as_real(t) if t.is_complex() else t for t in (expected, found))
    a, b = a.detach().double(), b.detach().double()
    finite = torch.isfinite(a)
    if not torch.equal(torch.isfinite(b), finite):
        return -math.inf
    a, b = a[finite], b[finite]
    signal, noise = float(a.square().sum()), float((a - b).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def floats_in(value: object) -> Iterator[Tensor]:
    """The floating and complex tensors of an output, in order."""
    names = named(value)
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex():
            yield value
    elif names is not None or isinstance(value, list | tuple):
        for child in names.values() if names is not None else value:
            yield from floats_in(child)
    elif hasattr(value, "__dict__"):
        yield from floats_in(list(vars(value).values()))


def worst_sqnr(expected: object, found: object) -> float:
    """The least SQNR of all floating outputs with more than a few elements."""
    pairs = list(zip(floats_in(expected), floats_in(found), strict=True))
    assert pairs, "no floating output"
    values = []
    for a, b in pairs:
        assert a.shape == b.shape, f"{list(b.shape)} instead of {list(a.shape)}"
        assert a.dtype == b.dtype, f"{b.dtype} instead of {a.dtype}"
        if a.numel() > FEW:
            values.append(sqnr(a, b))
    return min(values, default=math.inf)
