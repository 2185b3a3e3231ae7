"""`save_model` and `load_model`: atomic writes, checked reads."""

import json
import os
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.errors import FxquantError, LoadError, SaveError, check_type
from fxquant.graph.graph_module import check_graph
from fxquant.graph.identity import FINGERPRINT
from fxquant.graph.layers import NAMES_KEY
from fxquant.graph.left_alone import process_left_alone
from fxquant.measure.quantization_info import INFO_KEY, QuantizationInfo
from fxquant.numerics.digest import digest_of, text_digest
from fxquant.report.atomic import check_replaceable, write_atomically
from fxquant.report.tables import plain
from fxquant.serialization.container import DTYPE_NAMES, Container, not_readable
from fxquant.serialization.describe import Describer
from fxquant.serialization.rebuild import Rebuilder, damaged
from fxquant.serialization.schema import check_description
from fxquant.serialization.tensor_store import TensorReader
from fxquant.tracing.trace_report import REPORT_KEY, TraceReport

FORMAT = "fxquant"
VERSION = 2
# What damaged data makes Python raise while it is taken apart.
_MALFORMED = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError,
    RecursionError, OverflowError, SyntaxError, ArithmeticError,
)  # fmt: skip


def save_model(
    qmodel: GraphModule,
    path: str | os.PathLike[str],
    info: QuantizationInfo | None = None,
    *,
    allow: tuple[str, ...] = (),
    allow_modules: tuple[type[nn.Module], ...] = (),
) -> None:
    """Save a graph as one safetensors file without pickle.

    Before the file is put in place it is built again from what will be written: what could not be
    loaded is not saved.

    Args:
        qmodel: a quantized, traced or dequantized graph.
        path: where to; an existing file is replaced at once or not at all.
        info: a `QuantizationInfo`; by default the record that the graph carries.
        allow: names of further functions the graph may call, as `"package.module.function"` or
            `"library::op.overload"`.
        allow_modules: classes of opaque modules to save; loading needs them again.

    Raises:
        SaveError: something in the graph cannot be described, or the file cannot be written.
    """
    check_graph("save_model", qmodel, SaveError)
    if info is not None:
        check_type("info", info, QuantizationInfo, "Pass what quantize returned.", SaveError)
        _check_own(info, qmodel)
    check_replaceable(path)
    describer = Describer(allow, allow_modules)
    graph = describer.graph(qmodel)
    tensors = describer.writer.tensors
    report = qmodel.meta.get(REPORT_KEY)
    record = info.to_dict() if info is not None else qmodel.meta.get(INFO_KEY)
    description: dict[str, Any] = {
        "version": VERSION,
        "graph": graph,
        "modules": describer.modules,
        "names": qmodel.meta.get(NAMES_KEY, {}),
        "fingerprint": qmodel.meta.get(FINGERPRINT, {}),
        "info": plain(record),
        "trace": report.to_dict() if isinstance(report, TraceReport) else None,
        "digests": {name: _digest(name, tensor) for name, tensor in tensors.items()},
    }
    metadata = metadata_of(description)
    try:
        rebuilt = json.loads(metadata["description"])
        check_description(rebuilt)
        with process_left_alone():
            _graph_of(rebuilt, tensors, allow, allow_modules, None)
    except (FxquantError, *_MALFORMED) as error:
        raise SaveError(
            "save_model",
            found=f"a model that would not load again: {error}",
            needed="a graph that a file can hold",
            remedy="Trace the model again without the part named here, or keep it as an opaque "
            "module and pass allow_modules.",
        ) from error
    write_atomically(path, lambda file: _write(file, tensors, metadata))


def _check_own(info: QuantizationInfo, qmodel: GraphModule) -> None:
    """Refuse the record of another graph."""
    own = qmodel.meta.get(INFO_KEY)
    if own is None:
        return
    expected = [decision["module"] for decision in own["decisions"]]
    found = [decision.module for decision in info.decisions]
    if found != expected:
        other = next(iter([name for name in found if name not in expected] or found), "no layer")
        raise SaveError(
            "info",
            found=f"the record of another model: it decides on {len(found)} layers, {other!r} "
            "among them",
            needed=f"the record of this graph, with its {len(expected)} layers",
            remedy="Pass what quantize returned with this graph, or nothing: the graph carries its "
            "record.",
        )


def _write(file: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, the same bytes each time: safetensors puts metadata in any order."""
    save_file(tensors, file, metadata)
    with open(file, "r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = metadata
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) <= size:  # it has the same length, but that is for safetensors to change
            opened.seek(8)
            opened.write(text.ljust(size))


def metadata_of(description: dict[str, Any]) -> dict[str, str]:
    """What the header of a file says: the description, and its digest."""
    text = json.dumps(description)
    return {"format": FORMAT, "description": text, "digest": text_digest(text)}


def load_model(
    path: str | os.PathLike[str],
    *,
    allow: tuple[str, ...] = (),
    allow_modules: tuple[type[nn.Module], ...] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> GraphModule:
    """Load what `save_model` wrote; neither the model's class nor its source is needed.

    Args:
        path: the file.
        allow: names of further functions the file may call, if you trust it.
        allow_modules: classes of the opaque modules it holds.
        device: where to; devices that the graph names become this one. By default the CPU.
        dtype: of the floating tensors that are not part of a quantized weight; by default that in
            which they were saved.

    Returns:
        A graph whose outputs are those of the saved one, bit for bit. The record of its
        quantization is in `.meta["fxquant_info"]` as plain data.

    Raises:
        LoadError: the file is missing, damaged, from another version, or names something that is
            not allowed.
    """
    with Container(path) as file:
        description = _description(file, path)
        tensors = _read_tensors(file, description, path)
    try:
        where = None if device is None else torch.device(device)
        with process_left_alone():
            gm = _graph_of(description, tensors, allow, allow_modules, where)
        gm.meta[INFO_KEY] = description["info"]
        gm.meta[NAMES_KEY] = description["names"]
        gm.meta[FINGERPRINT] = description["fingerprint"]
        if description["trace"] is not None:
            gm.meta[REPORT_KEY] = TraceReport.from_dict(description["trace"])
        if device is not None or dtype is not None:
            gm.to(device=where, dtype=dtype)
    except LoadError as error:
        raise _in_file(path, error) from error
    except (*_MALFORMED, FxquantError) as error:
        raise _in_file(path, damaged(f"{type(error).__name__}: {error}")) from error
    return gm


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a saved file, without loading its tensors.

    Raises:
        LoadError: the file is missing, damaged, from another version or not fxquant's.
    """
    with Container(path) as file:
        return _description(file, path)


def _graph_of(
    description: dict[str, Any],
    tensors: dict[str, Tensor],
    allow: tuple[str, ...],
    allow_modules: tuple[type[nn.Module], ...],
    device: torch.device | None,
) -> GraphModule:
    reader = TensorReader(tensors)
    rebuilder = Rebuilder(description["modules"], reader, allow, allow_modules, device)
    gm = rebuilder.graph(description["graph"])
    rebuilder.check_all_used()
    return gm


def _digest(name: str, tensor: Tensor) -> str:
    dtype = DTYPE_NAMES.get(tensor.dtype)
    if dtype is None:
        raise SaveError(
            name,
            found=f"a tensor of {tensor.dtype}",
            needed="a dtype that safetensors can hold",
            remedy="Convert it before the model is traced.",
        )
    return digest_of(name, dtype, tensor)


def _read_tensors(
    file: Container, description: dict[str, Any], path: str | os.PathLike[str]
) -> dict[str, Tensor]:
    digests = description["digests"]
    tensors = {}
    for entry in file.entries:
        tensors[entry.name], digest = file.tensor(entry)
        if digests.get(entry.name) != digest:
            raise not_readable(
                f"{os.fspath(path)}: tensor {entry.name!r:.200}",
                "other bytes than were saved (its digest differs)",
            )
    missing = sorted(set(digests) - set(tensors))
    if missing:
        raise not_readable(f"{os.fspath(path)}: tensor {missing[0]!r:.200}", "nothing")
    return tensors


def _description(file: Container, path: str | os.PathLike[str]) -> dict[str, Any]:
    where = os.fspath(path)
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise LoadError(
            where,
            found="a safetensors file that fxquant did not write",
            needed="a file that fxquant.save_model wrote",
            remedy="Quantize the model and save it with fxquant.",
        )
    try:
        description = json.loads(metadata["description"])
        version = int(description["version"])
    except _MALFORMED as error:
        raise not_readable(where, f"a description that is no JSON ({error})") from error
    if version != VERSION:
        raise LoadError(
            where,
            found=f"format version {version}",
            needed=f"version {VERSION}",
            remedy="Upgrade fxquant." if version > VERSION else
            "It has no digests: quantize the model and save it again.",
        )  # fmt: skip
    if metadata.get("digest") != text_digest(metadata["description"]):
        raise not_readable(
            f"{where}: description", "other text than was saved (its digest differs)"
        )
    try:
        check_description(description)
    except LoadError as error:
        raise _in_file(path, error) from error
    return dict(description)


def _in_file(path: str | os.PathLike[str], error: LoadError) -> LoadError:
    return LoadError(
        f"{os.fspath(path)}: {error.where}",
        found=error.found,
        needed=error.needed,
        remedy=error.remedy,
    )
