"""Other libraries' INT4 Linear layers: for each that is installed, a way to run several layers.

A peer is made from float weights [out, in] of one shape. Calling it with x [rows, in] float32
multiplies x with each of them in turn.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import bitsandbytes
except ImportError:
    bitsandbytes = None
try:
    import onnx
    import onnxruntime
except ImportError:
    onnxruntime = None
try:
    import openvino
    from openvino import opset13
except ImportError:
    openvino = None

Peer = Callable[[Tensor], Any]


def installed_peers() -> dict[str, Callable[[Sequence[Tensor], int], Peer]]:
    """The peers that can be imported, by name; each takes weights and a group size."""
    peers = {
        "onnxruntime": (onnxruntime, onnx_runtime),
        "openvino": (openvino, open_vino),
        "bitsandbytes": (bitsandbytes, bits_and_bytes),
    }
    return {name: make for name, (module, make) in peers.items() if module is not None}


def round_groups(weight: Tensor, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric codes uint8 [out, groups, group_size] and scales float32 [out, groups]."""
    groups = weight.unflatten(1, (-1, group_size))
    scales = groups.abs().amax(-1) / 7
    codes = (groups / scales[..., None]).round().clamp(-8, 7) + 8
    return codes.to(torch.uint8).numpy(), scales.numpy()


def onnx_runtime(weights: Sequence[Tensor], group_size: int) -> Peer:
    """`MatMulNBits` at accuracy_level 4: activations become int8 on the fly."""
    rows, columns = weights[0].shape
    nodes, initializers, outputs = [], [], []
    for i, weight in enumerate(weights):
        codes, scales = round_groups(weight, group_size)
        packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
        initializers.append(onnx.numpy_helper.from_array(packed, f"B{i}"))
        initializers.append(onnx.numpy_helper.from_array(scales.reshape(-1), f"S{i}"))
        nodes.append(
            onnx.helper.make_node(
                "MatMulNBits",
                ["x", f"B{i}", f"S{i}"],
                [f"y{i}"],
                domain="com.microsoft",
                K=columns,
                N=rows,
                bits=4,
                block_size=group_size,
                accuracy_level=4,
            )
        )
        outputs.append(
            onnx.helper.make_tensor_value_info(f"y{i}", onnx.TensorProto.FLOAT, ["rows", rows])
        )
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["rows", columns])
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    graph = onnx.helper.make_graph(nodes, "layers", [x], outputs, initializers)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda x: session.run(None, {"x": x.numpy()})


def open_vino(weights: Sequence[Tensor], group_size: int) -> Peer:
    """Compressed u4 weights; activations become int8 on the fly, one scale a group."""
    rows, columns = weights[0].shape
    x = opset13.parameter([-1, columns], np.float32, name="x")
    results = []
    for weight in weights:
        codes, scales = round_groups(weight, group_size)
        packed = (codes[..., 0::2] | (codes[..., 1::2] << 4)).reshape(-1)
        shape = openvino.Shape([rows, columns // group_size, group_size])
        tensor = openvino.Tensor(packed, shape, openvino.Type.u4)
        stored = opset13.constant(tensor, shared_memory=False)
        # Its int8 path wants the zero point as an integer of 4 bits.
        eight = openvino.Tensor(
            np.full(1, 8, np.uint8), openvino.Shape([1, 1, 1]), openvino.Type.u4
        )
        zero = opset13.convert(opset13.constant(eight, shared_memory=False), np.float16)
        scale = opset13.constant(scales[..., None].astype(np.float16))
        value = opset13.multiply(opset13.subtract(opset13.convert(stored, np.float16), zero), scale)
        flat = opset13.reshape(value, np.array([rows, columns]), False)
        float_weight = opset13.convert(flat, np.float32)
        results.append(opset13.result(opset13.matmul(x, float_weight, False, True)))
    config = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group_size,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(openvino.Model(results, [x]), "CPU", config)
    request = compiled.create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)


def bits_and_bytes(weights: Sequence[Tensor], group_size: int) -> Peer:
    """Linear layers in nf4 with bfloat16 activations."""
    rows, columns = weights[0].shape
    layers = []
    for weight in weights:
        layer = bitsandbytes.nn.Linear4bit(
            columns, rows, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        layer.weight = bitsandbytes.nn.Params4bit(
            weight.bfloat16(), requires_grad=False, quant_type="nf4", blocksize=group_size
        )
        layers.append(layer.to("cpu").eval())

    def run(x: Tensor) -> None:
        x = x.bfloat16()
        for layer in layers:
            layer(x)

    return run
