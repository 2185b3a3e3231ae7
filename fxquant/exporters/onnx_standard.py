"""Operators of ONNX Runtime in an exported model, replaced by those of the ONNX standard.

before: `MatMulNBits(x, packed, scales, zero_points)`
after:  `MatMul(x, DequantizeLinear(weight uint4 [in, out], scales, zero_points))`

The weight is transposed: so ONNX Runtime makes one product of both again, and with a Transpose in
between it does not. torch has no tensors of 4 bits, so this happens in the exported model.
"""

from typing import Any

import numpy as np

from fxquant.exporters.onnx_layers import DEQUANTIZE, MATMUL, MIDDLE


def use_standard_operators(onnx: Any, model: Any) -> None:
    """Replace every `MatMulNBits` of `model`, an `onnx.ModelProto`, in place."""
    graph = model.graph
    constants = {t.name: t for t in graph.initializer}
    nodes: list[Any] = []
    used: set[str] = set()
    weights: dict[str, str] = {}  # the float weight by the packed one: a layer may run twice
    for node in graph.node:
        if node.op_type != MATMUL:
            nodes.append(node)
            continue
        packed = node.input[1]
        if packed not in weights:
            used.update(node.input[1:])
            nodes.append(_dequantize(onnx, graph, node, constants))
            weights[packed] = nodes[-1].output[0]
        inputs = [node.input[0], weights[packed]]
        nodes.append(onnx.helper.make_node("MatMul", inputs, list(node.output), node.name))
    kept = [t for t in graph.initializer if t.name not in used]
    own = [entry for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    fields = (graph.node, nodes), (graph.initializer, kept), (model.opset_import, own)
    for field, values in fields:
        del field[:]
        field.extend(values)


def _dequantize(onnx: Any, graph: Any, node: Any, constants: dict[str, Any]) -> Any:
    """The `DequantizeLinear` of a weight, whose constants become those of `graph`."""
    options = {a.name: a.i for a in node.attribute}
    arrays = [onnx.numpy_helper.to_array(constants[name]) for name in node.input[1:] if name]
    weight, scales, zero_points = _transposed(arrays, options)
    stem = node.input[1].removesuffix("packed") + "standard"
    names = [f"{stem}.{part}" for part in ("weight", "scales", "zero_points")]
    four_bits = onnx.TensorProto.UINT4
    for name, values in ((names[0], weight), (names[2], zero_points)):
        data = _nibbles(values)
        tensor = onnx.helper.make_tensor(name, four_bits, values.shape, data, raw=True)
        graph.initializer.append(tensor)
    graph.initializer.append(onnx.numpy_helper.from_array(scales, names[1]))
    made = onnx.helper.make_node(
        DEQUANTIZE, names, [f"{stem}.float"], f"{stem}.dequantize",
        axis=0, block_size=options["block_size"],
    )  # fmt: skip
    made.metadata_props.extend(node.metadata_props)
    return made


def _transposed(
    arrays: list[np.ndarray], options: dict[str, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The integers [in, out], scales [groups, out] and zero points [groups, out]."""
    packed, scales, *more = arrays
    out, blocks, _ = packed.shape
    q = np.stack([packed & 15, packed >> 4], -1).reshape(out, -1)[:, : options["K"]]
    zero_points = np.full((out, blocks), MIDDLE, np.uint8)
    if more:
        nibbles = np.stack([more[0] & 15, more[0] >> 4], -1).reshape(out, -1)
        zero_points = nibbles[:, :blocks]
    scales = scales.reshape(out, blocks)
    return q.T, np.ascontiguousarray(scales.T), zero_points.T


def _nibbles(values: np.ndarray) -> bytes:
    """The bytes of a tensor of 4-bit integers: two elements each, the first one low."""
    flat = np.ascontiguousarray(values).reshape(-1)
    flat = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return bytes(flat[0::2] | (flat[1::2] << 4))
