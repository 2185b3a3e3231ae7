"""One sentence encoder in several runtimes: accuracy, speed and size, ours beside their own INT4.

    OMP_WAIT_POLICY=passive python benchmarks/runtimes.py

all-MiniLM-L6-v2 (the extra `minilm`), quantized by fxquant with integer zero points, which every
format holds, and calibrated on 384 sentences of one book; one row is rounded without data. What
fxquant exported to ONNX is run by ONNX Runtime and by OpenVINO; beside it stand INT4 files that
ONNX Runtime's quantizer and NNCF made of the same float model, which need no data, and NNCF's W8A8,
calibrated on the same sentences; ours with 8 bits needs none. Every library takes part if it is
installed.

`to float` is the SQNR of the mean-pooled embedding against the float model on 256 sentences that
calibration did not see, `to ours` that against our graph in float32. Candidates take turns, medians
count: of the processor's time on one thread, of the clock's on several.
"""

import argparse
import copy
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import fair_clock, median_seconds, report
from torch import Tensor
from transformers import AutoModel

import fxquant

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from minilm import batches, embeddings, model_folder, sentences

GROUP = 128
KEEP = ["pooler"]
ACTIVATIONS = ("float32", "int8", "fastest")  # in OpenVINO
MEGABYTE = 10**6
Batch = dict[str, Tensor]
Run = Callable[[Batch], Tensor]  # gives token embeddings [sentences, length, 384]


def installed(name: str) -> Any:
    """The library of that name, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


onnx, onnxruntime, openvino, nncf = map(installed, ("onnx", "onnxruntime", "openvino", "nncf"))


class AsModel:
    """A runtime in the form that `embeddings` calls."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, **batch: Tensor) -> tuple[Tensor]:
        """The token embeddings alone."""
        return (self.run(batch),)


def in_torch(model: torch.nn.Module) -> Run:
    """A module."""
    return lambda batch: model(**batch)[0]


def in_onnx_runtime(path: Path) -> Run:
    """An ONNX file in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin would slow down whoever is measured next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = {value.name for value in session.get_inputs()}

    def run(batch: Batch) -> Tensor:
        given = {name: batch[name].numpy() for name in batch if name in names}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def in_openvino(model: Any, activations: str = "float32") -> Run:
    """An ONNX file, or a model of its own, in OpenVINO.

    Args:
        model: what it compiles.
        activations: "float32"; "int8", which rounds them on the fly; or "fastest", what OpenVINO
            chooses by itself, bfloat16 where the CPU has products of it.
    """
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    if activations != "fastest":
        config["INFERENCE_PRECISION_HINT"] = "f32"
        config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0 if activations == "float32" else GROUP
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    names = {name for value in request.model_inputs for name in value.names}

    def run(batch: Batch) -> Tensor:
        given = {name: batch[name].numpy() for name in batch if name in names}
        return torch.from_numpy(request.infer(given)[0].copy())

    return run


def size_of(path: Path) -> float:
    """Megabytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(file.stat().st_size for file in files) / MEGABYTE


def float_onnx(model: torch.nn.Module, example: Batch, path: Path) -> None:
    """The float model as torch exports it."""
    sizes = {name: {0: "batch", 1: "length"} for name in example}
    torch.onnx.export(
        model, (), path, kwargs=dict(example), dynamo=True, opset_version=21,
        dynamic_shapes=sizes, input_names=list(example), verbose=False,
    )  # fmt: skip


def ours(
    graph: torch.fx.GraphModule,
    without_data: torch.fx.GraphModule,
    eight: torch.fx.GraphModule,
    example: Batch,
    folder: Path,
) -> Iterator[tuple[str, Run, float]]:
    """The graphs of fxquant and the files that it exports: a name, how to run it, megabytes."""
    saved = folder / "ours.safetensors"
    fxquant.save_model(without_data, saved)
    yield "fxquant W4A16 without data", in_torch(without_data), size_of(saved)
    fxquant.save_model(graph, saved)
    yield "fxquant W4A16", in_torch(graph), size_of(saved)
    dynamic = copy.deepcopy(graph)
    for layer in dynamic.modules():
        if isinstance(layer, fxquant.QuantizedLinearInt4):
            layer.activation = "int8"
    yield "fxquant W4A8", in_torch(dynamic), size_of(saved)
    for name, plain in (("W4A16", graph), ("W4A8", dynamic)):
        fast = fxquant.fuse(plain).bfloat16()
        yield f"fxquant {name}, fused, bfloat16", in_torch(fast), size_of(saved)
    fxquant.save_model(eight, saved)
    fast = fxquant.fuse(eight).bfloat16()
    yield "fxquant W8A8, fused, bfloat16", in_torch(fast), size_of(saved)
    if onnxruntime is None:
        return
    for level in (0, 4):
        path = folder / f"ours-{level}.onnx"
        options = {"accuracy_level": level, "example_inputs": example}
        fxquant.export(graph, path, format="onnx", **options)
        name = f"fxquant's ONNX, level {level}, in ONNX Runtime"
        yield name, in_onnx_runtime(path), size_of(path)
    if openvino is not None:
        path = folder / "ours-0.onnx"
        for activations in ACTIVATIONS:
            name = f"fxquant's ONNX in OpenVINO, {activations}"
            yield name, in_openvino(str(path), activations), size_of(path)


def theirs(
    model: torch.nn.Module, calibration: list[Batch], folder: Path
) -> Iterator[tuple[str, Run, float]]:
    """The runtimes' own INT4 and INT8 of the float model: a name, how to run it, megabytes."""
    example = calibration[0]
    half = copy.deepcopy(model).bfloat16()
    yield "bfloat16 in torch", in_torch(half), sum(p.nbytes for p in half.parameters()) / MEGABYTE
    if onnxruntime is None:
        return
    made_by = importlib.import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    (folder / "float").mkdir()
    path, small = folder / "float" / "model.onnx", folder / "theirs.onnx"
    float_onnx(model, example, path)
    yield "float32 in ONNX Runtime", in_onnx_runtime(path), size_of(path.parent)
    for level in (0, 4):
        quantizer = made_by.MatMulNBitsQuantizer(
            onnx.load(path), block_size=GROUP, is_symmetric=False, accuracy_level=level
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(small))
        name = f"ONNX Runtime's INT4, level {level}"
        yield name, in_onnx_runtime(small), size_of(small)
    if openvino is None or nncf is None:
        return
    yield "float in OpenVINO, float32", in_openvino(str(path)), size_of(path.parent)
    yield "float in OpenVINO, fastest", in_openvino(str(path), "fastest"), size_of(path.parent)
    mode = nncf.CompressWeightsMode.INT4_ASYM
    read = openvino.Core().read_model(str(path))
    compressed = nncf.compress_weights(read, mode=mode, ratio=1.0, group_size=GROUP)
    file = folder / "nncf.xml"
    openvino.save_model(compressed, file, compress_to_fp16=False)
    size = size_of(file) + size_of(file.with_suffix(".bin"))
    for activations in ACTIVATIONS:
        name = f"NNCF's INT4 in OpenVINO, {activations}"
        yield name, in_openvino(compressed, activations), size
    given = [{name: batch[name].numpy() for name in batch} for batch in calibration]
    read = openvino.Core().read_model(str(path))
    eight = nncf.quantize(
        read, nncf.Dataset(given), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(given)
    )
    file = folder / "nncf-8.xml"
    openvino.save_model(eight, file, compress_to_fp16=False)
    size = size_of(file) + size_of(file.with_suffix(".bin"))
    yield "NNCF's W8A8 in OpenVINO, fastest", in_openvino(eight, "fastest"), size


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = model_folder()
    model = AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    calibration = batches(sentences("calibration", 384), folder)
    heldout = batches(sentences("heldout", 256), folder)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        example = calibration[0]
        plain = {
            "symmetric": False, "modules_to_not_convert": KEEP, "accuracy_warning": "ignore",
        }  # fmt: skip
        options = {**plain, "target": "onnx"}
        graph, _ = fxquant.static_quantize(model, calibration, method=arguments.method, **options)
        without_data, _ = fxquant.quantize(model, example_inputs=example, **options)
        eight, _ = fxquant.quantize(
            model, example_inputs=example, bits=8, activation_bits=8, **plain
        )
        size = sum(p.nbytes for p in model.parameters()) / MEGABYTE
        candidates: list[tuple[str, Run, float]] = [("float32 in torch", in_torch(model), size)]
        candidates += ours(graph, without_data, eight, example, Path(temporary))
        candidates += theirs(model, calibration, Path(temporary))
        expected, own = embeddings(model, heldout), embeddings(graph, heldout)
        one = {name: tensor[:1] for name, tensor in heldout[0].items()}
        runs: dict[str, Callable[[], Any]] = {}
        for name, run, _ in candidates:
            runs[f"{name} | batch"] = lambda run=run: run(heldout[0])
            runs[f"{name} | one"] = lambda run=run: [run(one) for _ in range(4)]
        seconds = median_seconds(runs, arguments.rounds, clock=fair_clock())
        rows = []
        for name, run, size in candidates:
            found = embeddings(AsModel(run), heldout)
            rows.append({
                "": name,
                "to float dB": fxquant.sqnr_db(expected, found),
                "to ours dB": fxquant.sqnr_db(own, found),
                "sentences/s, 32 at once": 32 / seconds[f"{name} | batch"],
                "one by one": 4 / seconds[f"{name} | one"],
                "MB": size,
            })  # fmt: skip
    title = f"all-MiniLM-L6-v2, {arguments.method}, {torch.get_num_threads()} threads"
    report(title, rows, arguments.json)


if __name__ == "__main__":
    main()
