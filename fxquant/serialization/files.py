"""`save_model` and `load_model`: atomic writes, checked reads."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.fx import GraphModule

from fxquant.analysis.graph_view import INFO_KEY
from fxquant.errors import FxquantError, LoadError, SaveError
from fxquant.graph.identity import FINGERPRINT
from fxquant.graph.layers import NAMES
from fxquant.report.tables import plain
from fxquant.serialization.describe import Describer
from fxquant.serialization.rebuild import Rebuilder, damaged
from fxquant.serialization.tensor_store import TensorReader
from fxquant.tracing.trace_report import REPORT_KEY, TraceReport

FORMAT = "fxquant"
VERSION = 1
LENGTH_BYTES = 8  # of the header's length, at the start of a safetensors file
LARGEST_HEADER = 100_000_000  # safetensors' own limit
# What damaged data makes Python raise while it is taken apart.
_MALFORMED = (
    KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, AssertionError,
    RecursionError, OverflowError, SyntaxError, ArithmeticError,
)  # fmt: skip


def save_model(
    qmodel: GraphModule,
    path: str | os.PathLike[str],
    info: Any = None,
    *,
    allow: tuple[str, ...] = (),
    allow_modules: tuple[type[nn.Module], ...] = (),
) -> None:
    """Save a graph as one safetensors file without pickle.

    Args:
        qmodel: a quantized, traced or dequantized graph.
        path: where to; an existing file is replaced at once or not at all.
        info: a `QuantizationInfo`; by default the record that the graph carries.
        allow: names of further functions the graph may call, as `"package.module.function"`.
        allow_modules: classes of opaque modules to save; loading needs them again.

    Raises:
        SaveError: something in the graph cannot be described, or the file cannot be written.
    """
    if not isinstance(qmodel, GraphModule):
        raise SaveError(
            "save_model",
            found=f"a {type(qmodel).__name__}",
            needed="a GraphModule",
            remedy="Pass the graph that fxquant.quantize or fxquant.trace returned.",
        )
    describer = Describer(allow, allow_modules)
    description: dict[str, Any] = {"version": VERSION, "graph": describer.graph(qmodel)}
    description["modules"] = describer.modules
    description["names"] = qmodel.meta.get(NAMES, {})
    description["fingerprint"] = qmodel.meta.get(FINGERPRINT, {})
    record = info.to_dict() if info is not None else qmodel.meta.get(INFO_KEY)
    description["info"] = plain(record)
    report = qmodel.meta.get(REPORT_KEY)
    description["trace"] = report.to_dict() if isinstance(report, TraceReport) else None
    metadata = {"format": FORMAT, "description": json.dumps(description)}
    tensors = describer.writer.tensors
    write_atomically(Path(path), lambda file: save_file(tensors, file, metadata))


def load_model(
    path: str | os.PathLike[str],
    *,
    allow: tuple[str, ...] = (),
    allow_modules: tuple[type[nn.Module], ...] = (),
) -> GraphModule:
    """Load what `save_model` wrote; neither the model's class nor its source is needed.

    Args:
        path: the file.
        allow: names of further functions the file may call, if you trust it.
        allow_modules: classes of the opaque modules it holds.

    Returns:
        A graph whose outputs are those of the saved one, bit for bit. The record of its
        quantization is in `.meta["fxquant_info"]` as plain data.

    Raises:
        LoadError: the file is missing, damaged, from a newer version, or names something that is
            not allowed.
    """
    description = read_description(path)
    with safe_open(str(path), framework="pt") as file:
        # Copies: where a tensor of a mapped file begins depends on the file, and some kernels
        # round differently at other alignments.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    try:
        rebuilder = Rebuilder(description["modules"], TensorReader(tensors), allow, allow_modules)
        gm = rebuilder.graph(description["graph"])
        gm.meta[INFO_KEY] = description["info"]
        gm.meta[NAMES] = {str(k): str(v) for k, v in description.get("names", {}).items()}
        gm.meta[FINGERPRINT] = description.get("fingerprint", {})
        if description["trace"] is not None:
            gm.meta[REPORT_KEY] = TraceReport.from_dict(description["trace"])
    except LoadError as error:
        raise _in_file(path, error) from error
    except (*_MALFORMED, FxquantError) as error:
        raise _in_file(path, damaged(f"{type(error).__name__}: {error}")) from error
    return gm


def read_description(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in a saved file, without loading its tensors.

    Raises:
        LoadError: the file is missing, damaged, from a newer version or not fxquant's.
    """
    where = os.fspath(path)
    _check_header(Path(path))
    try:
        with safe_open(where, framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, *_MALFORMED, OSError) as error:
        raise _not_readable(where, str(error)) from error
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
        raise _not_readable(where, f"a description that is no JSON ({error})") from error
    if version > VERSION:
        raise LoadError(
            where,
            found=f"format version {version}",
            needed=f"at most {VERSION}",
            remedy="Upgrade fxquant.",
        )
    return dict(description)


def write_atomically(path: Path, write: Callable[[str], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place.

    Raises:
        SaveError: the folder is missing or read-only, or the disk is full; an old file is kept.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
    except (OSError, SafetensorError) as error:
        raise SaveError(
            str(path),
            found=str(error),
            needed="a folder that exists, can be written and has space",
            remedy="Create the folder, free some space, or choose another path.",
        ) from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_header(path: Path) -> None:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    except OSError as error:
        raise _not_readable(str(path), str(error)) from error
    if size < LENGTH_BYTES or length > min(size - LENGTH_BYTES, LARGEST_HEADER):
        raise _not_readable(str(path), f"{size} bytes that are no safetensors file")


def _not_readable(where: str, found: str) -> LoadError:
    return LoadError(
        where,
        found=found,
        needed="a whole file that fxquant.save_model wrote",
        remedy="Check the path; if the file is damaged, copy or save it again.",
    )


def _in_file(path: str | os.PathLike[str], error: LoadError) -> LoadError:
    return LoadError(
        f"{os.fspath(path)}: {error.where}",
        found=error.found,
        needed=error.needed,
        remedy=error.remedy,
    )
