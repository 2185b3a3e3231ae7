"""Models and data that the command line names."""

import importlib
import runpy
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.analysis.gate import read_report
from fxquant.cli.checkpoint_folder import load_folder, text_batches
from fxquant.cli.output import UserCodeError
from fxquant.errors import OptionError, near_misses
from fxquant.serialization.files import load_model, read_description

_NAMED = (
    "package.module:function, path/to/file.py:function, a folder with a checkpoint, or a "
    ".safetensors file that fxquant saved"
)
FILE_BATCH_ROWS = 8  # of a batch, where a file of inputs is split


def load_source(name: str) -> nn.Module:
    """The model that MODEL names: a function's, a checkpoint's, or the graph in a saved file.

    Raises:
        OptionError: there is no such function, or it makes no module.
        LoadError: the file cannot be loaded.
    """
    if name.endswith(".safetensors"):
        return load_model(name)
    if Path(name).is_dir():
        return load_folder(Path(name))
    model = call_factory(name, "MODEL")
    if isinstance(model, nn.Module):
        return model
    raise OptionError(
        f"MODEL {name!r}",
        found=f"that it gives a {type(model).__name__}",
        needed="a torch.nn.Module",
        remedy="Name a function without arguments that returns the model.",
    )


def load_graph(name: str) -> GraphModule:
    """The graph in a saved file.

    Raises:
        LoadError: the file cannot be loaded.
    """
    return load_model(name)


def load_data(name: str | None, model: str) -> Iterable[Any] | None:
    """The batches that --data names.

    Args:
        name: a function, a `.npy` or `.safetensors` file of inputs, or a text file; None for no
            data.
        model: what MODEL is: a text needs the tokenizer of a checkpoint's folder.

    Raises:
        OptionError: it names nothing that can be read.
    """
    if name is None:
        return None
    path = Path(name)
    if path.suffix == ".npy" and path.is_file():
        return list(torch.from_numpy(np.load(path, allow_pickle=False)).split(FILE_BATCH_ROWS))
    if path.suffix == ".safetensors" and path.is_file():
        return _split(load_file(path))
    if path.is_file() and ":" not in name:
        return text_batches(path, Path(model))
    data = call_factory(name, "--data")
    return data if isinstance(data, Iterable) and not isinstance(data, Tensor) else [data]


def _split(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Batches of keyword arguments from one tensor for each argument."""
    rows = max((len(tensor) for tensor in tensors.values()), default=0)
    starts = range(0, rows, FILE_BATCH_ROWS)
    return [
        {name: t[start : start + FILE_BATCH_ROWS] for name, t in tensors.items()}
        for start in starts
    ]


def call_factory(name: str, where: str) -> Any:
    """Call the function named `package.module:function` or `path/to/file.py:function`.

    A model that is named itself is returned.

    Raises:
        OptionError: it cannot be imported, or there is no such function.
        UserCodeError: its file or the function raised.
    """
    module, _, function = name.rpartition(":")
    if not module:
        raise OptionError(
            f"{where} {name!r}",
            found="nothing before the colon" if ":" in name else "a name without a colon",
            needed=_NAMED,
            remedy="Write the module or the file, a colon, and the name of the function.",
        )
    try:
        names = _import(module)
    except (ImportError, ValueError, OSError) as error:
        raise OptionError(
            f"{where} {name!r}",
            found=f"that it cannot be imported: {type(error).__name__}: {error}",
            needed=_NAMED,
            remedy="Check the spelling, and that the package is installed or in this folder.",
        ) from error
    except Exception as error:  # a user's file may raise anything at all
        raise _raised(where, name, error) from error
    if not hasattr(names, function):
        close = near_misses(function, vars(names), count=1)
        raise OptionError(
            f"{where} {name!r}",
            found=f"that {module} has no {function!r}",
            needed="the name of a function in it",
            remedy=f"Did you mean {close[0]!r}?" if close else "Check the spelling.",
        )
    made = getattr(names, function)
    if isinstance(made, nn.Module):  # a model instead of what makes it
        return made
    if not callable(made):
        raise OptionError(
            f"{where} {name!r}",
            found=f"that {function!r} is no function but a {type(made).__name__}",
            needed="a function without arguments",
            remedy=f"Write a function that returns {function}, and name that.",
        )
    try:
        return made()
    except Exception as error:
        raise _raised(where, name, error) from error


def _import(module: str) -> Any:
    """An object whose attributes are the names of a module or of a file."""
    if module.endswith(".py"):
        sys.path.insert(0, str(Path(module).resolve().parent))
        return SimpleNamespace(**runpy.run_path(module))
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(module)


def _raised(where: str, name: str, error: Exception) -> UserCodeError:
    raised = UserCodeError(
        f"{where} {name!r}",
        found=f"that it raised {type(error).__name__}: {error}",
        needed="a function without arguments that runs",
        remedy="The traceback above shows where.",
    )
    raised.trace = "".join(traceback.format_exception(error))
    return raised


def load_report(path: Path) -> dict[str, Any]:
    """The figures in a JSON report, or in the record that a saved model carries.

    Raises:
        OptionError: the file is no report, or the model carries no record.
        LoadError: the saved model is damaged.
    """
    if path.suffix != ".safetensors":
        return read_report(path)
    record = read_description(path).get("info")
    if not isinstance(record, dict) or not isinstance(record.get("rows"), list):
        raise OptionError(
            str(path),
            found="a graph without a record of quantization",
            needed="a quantized model",
            remedy="Save what fxquant.static_quantize returned.",
        )
    return record
