"""GGUF files for llama.cpp: quantized blocks in the place of the weights of the float model's file.

llama.cpp's own converter makes the file of the float model, and with it says what tensors are
called and how their rows are ordered. Each quantized layer takes the place of its weight there:

- Q4_0, symmetric: blocks of 32, a float16 d and the nibbles q[j] | q[j + 16] << 4: d · (q − 8).
- Q4_1, whole zero points: d and m = −d · zero point, both float16: d · q + m.
- Q8_0: blocks of 32, a float16 d and 32 int8.

Source: https://github.com/ggml-org/llama.cpp, `ggml/src/ggml-common.h`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fxquant.config.targets import GGUF_BLOCK, TARGETS, Target
from fxquant.exporters.findings import Finding
from fxquant.exporters.gguf_file import GgufFile, Permutation
from fxquant.exporters.integer_layer import IntegerLayer, integer_layer
from fxquant.exporters.optional import optional_library
from fxquant.exporters.requirements import (
    exact_scales,
    float_activations,
    given_base,
    holdable,
    linear_layers_only,
    within,
)
from fxquant.exporters.source import Source
from fxquant.exporters.verify import verify_weights
from fxquant.report.atomic import write_atomically


@dataclass(frozen=True)
class Gguf:
    """INT4 and INT8 layers.

    Attributes:
        base: the GGUF file that llama.cpp's converter made of the float model, in F32, F16 or BF16.
    """

    base: str | os.PathLike[str] | None = None

    target: ClassVar[Target] = TARGETS["gguf"]

    def findings(self, source: Source) -> Iterator[Finding]:
        """What would be lost."""
        yield from linear_layers_only(source, self.target)
        yield from float_activations(source)
        file = None if self.base is None else self._open(self.base)
        for name, module in source.layers.items():
            layer = integer_layer(module)
            unknown = list(holdable(name, layer, self.target))
            yield from unknown
            if layer is None or unknown:
                continue
            yield from exact_scales(name, layer, torch.float16, self.target)
            if not layer.symmetric:
                offsets = layer.scales * layer.zero_points
                if layer.bits == 8 or not torch.equal(offsets, offsets.half().float()):
                    problem = "scale times zero point is no float16 number, which Q4_1 stores"
                    yield Finding(name, problem, within(self.target))
            if file is not None:
                yield from self._base_findings(name, layer, file)
        if file is not None:
            yield from _changed_floats(source, file)

    def _base_findings(self, name: str, layer: IntegerLayer, file: GgufFile) -> Iterator[Finding]:
        remedy = "Pass the GGUF file of the float model that was quantized, in F32, F16 or BF16."
        if file.weight_name(name) is None:
            yield Finding(name, "base has no tensor for it", remedy)
        elif file.permutation(name, _weight(layer)) is None:
            yield Finding(name, "base has another weight there", remedy)
        elif layer.bias is not None and bool(layer.bias.any()) and not file.bias_name(name):
            problem = "calibration gave it a bias, for which the file has no place"
            yield Finding(name, problem, within(self.target))

    def write(self, source: Source, path: str | os.PathLike[str]) -> None:
        """Write, read back, put in place.

        Raises:
            OptionError: `base` is missing or no GGUF file, or the library is.
            SaveError: a weight reads back differently, or the file cannot be written.
        """
        base = given_base(
            self.base,
            "the GGUF file of the float model, whose names and order are taken over",
            "Make it with llama.cpp's convert_hf_to_gguf.py, and pass base=.",
        )
        file = self._open(base)
        replaced: dict[str, tuple[np.ndarray, Any]] = {}
        orders: dict[str, Permutation] = {}
        for name, module in source.layers.items():
            layer = integer_layer(module)
            assert layer is not None  # a finding otherwise
            order = file.permutation(name, _weight(layer))
            assert order is not None  # a finding otherwise
            orders[name] = order
            kind, blocks = packed_blocks(layer)
            kinds = file.library.GGMLQuantizationType
            replaced[str(file.weight_name(name))] = order.rows(blocks), kinds[kind]
            bias = file.bias_name(name)
            if layer.bias is not None and bias is not None:
                values = order.rows(layer.bias.float().numpy()[:, None])[:, 0]
                replaced[bias] = np.ascontiguousarray(values), kinds.F32

        def save(new: str) -> None:
            file.save(Path(new), replaced)
            written = GgufFile(file.library, new)

            def read(name: str) -> Tensor:
                found = written.values(str(written.weight_name(name)))
                return torch.from_numpy(orders[name].undone(found))

            verify_weights(source.layers.items(), read)

        write_atomically(path, save)

    def _open(self, base: str | os.PathLike[str]) -> GgufFile:
        return GgufFile(optional_library("gguf", "gguf", "to read and write GGUF files"), base)


def packed_blocks(layer: IntegerLayer) -> tuple[str, np.ndarray]:
    """The name of the type, and the bytes of the weight's blocks, uint8 [out, bytes]."""
    rows, columns = layer.shape
    each = min(layer.group_size, columns) // GGUF_BLOCK
    scales = layer.scales.repeat_interleave(each, dim=1)  # [out, blocks]
    q = layer.q.numpy().reshape(rows, -1, GGUF_BLOCK)
    parts = [_float16(scales)]
    if layer.bits == 8:
        kind, codes = "Q8_0", q ^ 0x80
    else:
        half = GGUF_BLOCK // 2
        kind, codes = "Q4_0", q[..., :half] | (q[..., half:] << 4)
    if not layer.symmetric:
        kind = "Q4_1"
        parts.append(_float16(-scales * layer.zero_points.repeat_interleave(each, dim=1)))
    return kind, np.concatenate([*parts, codes], axis=-1).reshape(rows, -1)


def _float16(values: Tensor) -> np.ndarray:
    """The bytes of `values` [out, blocks]: uint8 [out, blocks, 2]."""
    return values.half().numpy()[..., None].view(np.uint8)


def _weight(layer: IntegerLayer) -> np.ndarray:
    each, columns = min(layer.group_size, layer.shape[1]), layer.shape[1]
    scales, zero_points = (
        t.repeat_interleave(each, dim=1)[:, :columns] for t in (layer.scales, layer.zero_points)
    )
    return (scales * (layer.q - zero_points)).numpy()


def _changed_floats(source: Source, file: GgufFile) -> Iterator[Finding]:
    """Norms that channel scales were folded into: the file keeps those of the float model."""
    for name, tensor in source.tensors.items():
        stem, _, part = name.rpartition(".")
        found = file.weight_name(stem) if part == "weight" and tensor.ndim == 1 else None
        if found is None:
            continue
        ours, theirs = tensor.float().cpu().numpy(), file.values(found)
        # Some converters store a norm's weight plus 1, as the model computes with it.
        same = theirs.shape == ours.shape and any(
            np.allclose(theirs, ours + more, rtol=1e-2, atol=1e-3) for more in (0, 1)
        )
        if not same:
            remedy = "Quantize with a method without awq or smoothquant."
            yield Finding(name, "base has other values: a channel scale was folded in", remedy)
