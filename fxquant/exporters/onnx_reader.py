"""The weights in an ONNX file, read by code that knows the operators only."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxquant.exporters.onnx_layers import DEQUANTIZE, LAYER, MATMUL


class OnnxReader:
    """The layers of an ONNX model, by the name that their operator carries.

    Args:
        onnx: the library.
        path: of the file.
    """

    def __init__(self, onnx: Any, path: Path) -> None:
        self._onnx = onnx
        self.model = onnx.load(path)
        self._constants = {t.name: t for t in self.model.graph.initializer}
        self._nodes: dict[str, Any] = {}
        for node in self.model.graph.node:
            names = [p.value for p in node.metadata_props if p.key == LAYER]
            if names and node.op_type in (MATMUL, DEQUANTIZE):
                self._nodes[names[0]] = node

    @property
    def names(self) -> set[str]:
        """Of the layers."""
        return set(self._nodes)

    def weight(self, name: str) -> Tensor:
        """The float32 weight [out, in] of a layer.

        Raises:
            KeyError: there is no such layer, or one of its tensors is missing.
        """
        node = self._nodes[name]
        options = {a.name: a.i for a in node.attribute}
        values = self._matmul if node.op_type == MATMUL else self._dequantized
        return torch.from_numpy(values([n for n in node.input if n], options))

    def _matmul(self, inputs: list[str], options: dict[str, int]) -> np.ndarray:
        packed, scales = (self._array(name) for name in inputs[1:3])
        out, blocks, half = packed.shape
        q = np.empty((out, blocks, 2 * half), np.float32)
        q[..., 0::2], q[..., 1::2] = packed & 15, packed >> 4
        zero_points = np.full((out, blocks), 8, np.float32)
        if len(inputs) > 3:
            given = self._array(inputs[3])
            if given.dtype == np.uint8:
                nibbles = np.stack([given & 15, given >> 4], -1).reshape(out, -1)
                given = nibbles[:, :blocks]
            zero_points = given.reshape(out, blocks).astype(np.float32)
        values = (q - zero_points[..., None]) * scales.reshape(out, blocks, 1)
        return values.reshape(out, -1)[:, : options["K"]]

    def _dequantized(self, inputs: list[str], options: dict[str, int]) -> np.ndarray:
        q, scales, *more = (self._array(name) for name in inputs)
        zero_points = more[0] if more else np.zeros_like(scales)
        if scales.ndim == 2:  # groups along the inputs
            scales, zero_points = (
                np.repeat(t, options["block_size"], axis=0)[: len(q)] for t in (scales, zero_points)
            )
        return np.ascontiguousarray(((q - zero_points) * scales).T)

    def _array(self, name: str) -> np.ndarray:
        """A constant; integers narrower than a byte and floats as float32."""
        tensor = self._constants[name]
        types = self._onnx.TensorProto
        if tensor.data_type == types.UINT4:
            data = np.frombuffer(tensor.raw_data, np.uint8)
            nibbles = np.stack([data & 15, data >> 4], -1).reshape(-1)
            return nibbles[: np.prod(tensor.dims)].reshape(tensor.dims).astype(np.float32)
        values = self._onnx.numpy_helper.to_array(tensor)
        return values if values.dtype == np.uint8 else values.astype(np.float32)
