"""Models and data named on the command line."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxquant.analysis.gate import read_report
from fxquant.errors import OptionError
from fxquant.serialization.files import load_model, read_description


def load_source(name: str) -> nn.Module:
    """The model called `package.module:factory`, or the graph in a saved file.

    Raises:
        OptionError: there is no such factory, or it makes no module.
        LoadError: the file cannot be loaded.
    """
    if name.endswith(".safetensors"):
        return load_model(name)
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


def load_data(name: str | None) -> Iterable[Any] | None:
    """The data called `package.module:factory`."""
    if name is None:
        return None
    data = call_factory(name, "--data")
    return data if isinstance(data, Iterable) else [data]


def call_factory(name: str, where: str) -> Any:
    """Call the function named `package.module:function`; the working folder is searched too.

    Raises:
        OptionError: it cannot be imported.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(
            f"{where} {name!r}",
            found=f"that it cannot be imported: {error}",
            needed="package.module:function, or a .safetensors file that fxquant saved",
            remedy="Check the spelling, and that the package is installed or in this folder.",
        ) from error
    return factory()


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
