"""What the formats of other runtimes can hold: kept to while quantizing, checked when exporting.

To support a format, add a row to `TARGETS`; `exporters/` writes it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

WORD = 32  # bits
GGUF_BLOCK = 32  # inputs that share a scale in GGUF
LEAST_BLOCK = 16  # inputs that share a scale, in ONNX Runtime's product
MODEL_DTYPE = "model"  # scales are stored in the dtype of the layer's float weight


@dataclass(frozen=True)
class Target:
    """What a format can hold.

    Attributes:
        name: of the format, as `export` takes it.
        widths: bits of an integer.
        scale_dtype: of stored scales; `"model"`: that of the layer's float weight.
        shape_problems: what keeps a weight from being stored, given `(out, in, bits, group)` with
            the columns of a group; yields texts.
        adds_biases: whether a layer may get a bias that the model's class has no place for.
        activations: which quantized activations it can hold: `"static"` ranges, those that are
            found while the model runs (`"dynamic"`), or none.
        has_zero_points: whether zero points may differ from group to group.
    """

    name: str
    widths: tuple[int, ...]
    scale_dtype: torch.dtype | str
    shape_problems: Callable[[int, int, int, int], Iterator[str]]
    adds_biases: bool = False
    activations: tuple[str, ...] = ()
    has_zero_points: bool = True

    def problems(self, shape: tuple[int, ...], bits: int, group_size: int) -> list[str]:
        """Why a weight [out, in] cannot be stored; nothing if it can.

        Args:
            shape: `(out, in)`.
            bits: of an integer.
            group_size: columns a group; a larger one than `in` counts as one group a row.
        """
        if bits not in self.widths:
            known = " or ".join(map(str, self.widths))
            return [f"the format has no {bits} bits, only {known}"]
        out_features, in_features = shape
        return list(
            self.shape_problems(out_features, in_features, bits, min(group_size, in_features))
        )

    def stored_dtype(self, weight_dtype: torch.dtype) -> torch.dtype:
        """The dtype of scales, for a layer whose float weight has `weight_dtype`."""
        return weight_dtype if isinstance(self.scale_dtype, str) else self.scale_dtype


def _whole_groups(columns: int, group: int, multiple: int = 1) -> Iterator[str]:
    if columns % group or group % multiple:
        size = f" that is a multiple of {multiple}" if multiple > 1 else ""
        yield f"groups of {group} do not divide its {columns} inputs into groups of one size{size}"


def _whole_words(out_features: int, in_features: int, rows: int, columns: int) -> Iterator[str]:
    if out_features % rows or in_features % columns:
        needed = f"outputs in multiples of {rows} and inputs in multiples of {columns}"
        shape = f"{out_features} x {in_features}"
        yield f"{shape} does not fill the format's words, which need {needed}"


def _compressed_tensors(out: int, columns: int, bits: int, group: int) -> Iterator[str]:
    yield from _whole_groups(columns, group)


def _gptq(out: int, columns: int, bits: int, group: int) -> Iterator[str]:
    yield from _whole_groups(columns, group)
    yield from _whole_words(out, columns, WORD // bits, WORD // bits)


def _awq(out: int, columns: int, bits: int, group: int) -> Iterator[str]:
    yield from _whole_groups(columns, group)
    yield from _whole_words(out, columns, WORD // bits, 1)


def _onnx(out: int, columns: int, bits: int, group: int) -> Iterator[str]:
    if bits == 8 and group != columns:
        yield from _whole_groups(columns, group)
    if bits == 4 and group != columns and group % LEAST_BLOCK:
        yield f"groups of {group} are no multiple of {LEAST_BLOCK}"


def _gguf(out: int, columns: int, bits: int, group: int) -> Iterator[str]:
    yield from _whole_groups(columns, group, GGUF_BLOCK)


TARGETS = {
    target.name: target
    for target in (
        Target(
            "compressed-tensors", (4, 8), MODEL_DTYPE, _compressed_tensors, activations=("dynamic",)
        ),
        Target("gptq", (4, 8), torch.float16, _gptq),
        Target("awq", (4,), torch.float16, _awq),
        Target("gguf", (4, 8), torch.float16, _gguf, has_zero_points=False),
        Target("onnx", (4, 8), MODEL_DTYPE, _onnx, adds_biases=True, activations=("static",)),
    )
}
