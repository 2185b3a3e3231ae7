"""Quantized layers and quantized activations as ONNX operators.

In place of each layer stands a module whose forward is one operator, which torch's exporter writes
as it is. The operator carries the layer's name, by which `onnx_reader.py` finds it again.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.config.targets import LEAST_BLOCK
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.modules.activation import dequantize_activation, quantize_activation

MATMUL, DOMAIN = "MatMulNBits", "com.microsoft"
DEQUANTIZE, QUANTIZE = "DequantizeLinear", "QuantizeLinear"
OPSET = 21  # the first with groups in DequantizeLinear and with 4-bit integers
LAYER = "fxquant.layer"  # in the metadata of an operator: the name of the layer
MOST_BLOCK = 256  # inputs that share a scale: a power of two
MIDDLE = 8  # the zero point where there is none


class OnnxLayer(nn.Module):
    """A layer that becomes operators, in the dtype of the model."""

    bias: Tensor | None

    def __init__(self, name: str, layer: IntegerLayer, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.shape
        self.dtype, self._metadata = dtype, {LAYER: name}
        self.register_buffer("bias", None if layer.bias is None else layer.bias.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        y = self._product(x.to(self.dtype))
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        raise NotImplementedError(type(self).__name__)


class OnnxInt4(OnnxLayer):
    """`MatMulNBits`: packed [out, blocks, block / 2], lowest nibble first, scales in a row."""

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None

    def __init__(
        self, name: str, layer: IntegerLayer, dtype: torch.dtype, accuracy_level: int
    ) -> None:
        super().__init__(name, layer, dtype)
        self.block, self.accuracy_level = block_size(layer), accuracy_level
        columns = self.in_features
        blocks = -(-columns // self.block)
        q = F.pad(layer.q, (0, blocks * self.block - columns)).unflatten(1, (blocks, self.block))
        self.register_buffer("packed", q[..., 0::2] | (q[..., 1::2] << 4))
        self.register_buffer("scales", self._by_block(layer.scales, layer).to(dtype).flatten())
        zeros = None if layer.symmetric else self._by_block(layer.zero_points, layer)
        self.register_buffer("zero_points", None if zeros is None else _stored_zeros(zeros, dtype))

    def _by_block(self, values: Tensor, layer: IntegerLayer) -> Tensor:
        """Values of groups [out, groups] for blocks, of which a group has one or more."""
        blocks = -(-self.in_features // self.block)
        each = -(-min(layer.group_size, self.in_features) // self.block)
        return values.repeat_interleave(each, dim=1)[:, :blocks].contiguous()

    def _product(self, x: Tensor) -> Tensor:
        given = [x, self.packed, self.scales]
        if self.zero_points is not None:
            given.append(self.zero_points)
        attributes: dict[str, Any] = {
            "K": self.in_features,
            "N": self.out_features,
            "bits": 4,
            "block_size": self.block,
            "accuracy_level": self.accuracy_level,
        }
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::{MATMUL}", given, attributes, dtype=x.dtype, version=1,
            shape=(*x.shape[:-1], self.out_features), metadata_props=self._metadata,
        )  # fmt: skip


class OnnxInt8(OnnxLayer):
    """`DequantizeLinear` of the transposed weight int8 [in, out], then `MatMul`."""

    weight: Tensor
    scales: Tensor

    def __init__(self, name: str, layer: IntegerLayer, dtype: torch.dtype) -> None:
        super().__init__(name, layer, dtype)
        self.is_per_row = layer.is_per_row
        self.group_size = layer.group_size
        self.register_buffer("weight", (layer.q.T ^ 0x80).view(torch.int8).contiguous())
        scales = layer.scales.to(dtype).T.contiguous()  # [groups, out]
        self.register_buffer("scales", scales[0] if self.is_per_row else scales)

    def _product(self, x: Tensor) -> Tensor:
        attributes: dict[str, Any] = {"axis": 1}
        if not self.is_per_row:
            attributes = {"axis": 0, "block_size": self.group_size}
        weight = torch.onnx.ops.symbolic(
            DEQUANTIZE, [self.weight, self.scales], attributes, dtype=self.dtype, version=OPSET,
            shape=self.weight.shape, metadata_props=self._metadata,
        )  # fmt: skip
        return x @ weight


def block_size(layer: IntegerLayer) -> int:
    """The columns of a block of `MatMulNBits`: the largest power of two that divides a group."""
    size = min(layer.group_size, layer.shape[1])
    if layer.is_per_row:  # the last block may be short
        size = MOST_BLOCK if size >= MOST_BLOCK else LEAST_BLOCK
    return min(size & -size, MOST_BLOCK)


def _stored_zeros(zeros: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero points [out, blocks] as `MatMulNBits` takes them: packed if they are whole."""
    if bool((zeros != zeros.round()).any()):
        return zeros.to(dtype)
    q = F.pad(zeros.to(torch.uint8), (0, zeros.shape[1] % 2))
    return (q[:, 0::2] | (q[:, 1::2] << 4)).flatten()


def with_onnx_activations(gm: GraphModule) -> None:
    """Let quantized activations be `QuantizeLinear` and `DequantizeLinear`, in place.

    Each channel has a grid of its own. ONNX Runtime takes such grids in these operators for
    products that it then cannot compute, so the channels are brought to one grid, of scale 1.
    """
    operators: dict[Any, Callable[..., Any]] = {
        quantize_activation: _quantize_linear,
        dequantize_activation: _dequantize_linear,
    }
    for node in gm.graph.nodes:
        node.target = operators.get(node.target, node.target)
    gm.recompile()


def _quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    places = x.float() / scale + zero_point
    return torch.onnx.ops.symbolic(
        QUANTIZE, [places, torch.ones(())], dtype=torch.uint8, shape=x.shape, version=OPSET
    )


def _dequantize_linear(q: Tensor, scale: Tensor, zero_point: Tensor, like: Tensor) -> Tensor:
    levels = torch.onnx.ops.symbolic(
        DEQUANTIZE, [q, torch.ones(())], dtype=torch.float32, shape=q.shape, version=OPSET
    )
    return ((levels - zero_point) * scale).to(like.dtype)
