"""`load_checkpoint`: a model that was quantized elsewhere, in the layers of this package."""

import os
import warnings
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.errors import LoadError, caller_level, check_path
from fxquant.exporters.awq import Awq
from fxquant.exporters.checkpoint import CheckpointFormat
from fxquant.exporters.compressed_tensors import PACKED_FORMAT, CompressedTensors
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.gguf_load import load_gguf
from fxquant.exporters.gptq import Gptq
from fxquant.exporters.meta_model import meta_model
from fxquant.exporters.placing import (
    layer_of,
    put_experts,
    put_layer,
    warn_of_rounded,
)
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.stored_names import WEIGHT, stored_parameters
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.packed_parameter import child_name
from fxquant.numerics.grouping import activation_group
from fxquant.swap import finish_quantized

CHECKPOINT_FORMATS: dict[str, type[CheckpointFormat]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}
QUANTIZATION = "quantization_config"


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a Hugging Face folder, or a GGUF file, quantized elsewhere into the user's class.

    Args:
        folder: with tensors in the format compressed-tensors (pack-quantized), GPTQ or AWQ; or a
            GGUF file, whose layers in Q4_0, Q4_1 and Q8_0 are loaded.
        model: a model of the class whose folder it is, whatever its weights; it is not changed. By
            default the class that the config names is made, which needs transformers. For a GGUF
            file the float model itself: its weights tell in which order the file has their rows.

    Returns:
        A copy of `model` with quantized layers, in evaluation mode. Integers and zero points are
        those of the folder. Our layers store scales in bfloat16: what fxquant exported comes back
        exactly; scales with more digits are rounded, and a `RoundedScalesWarning` says how close
        the weights are.

    Raises:
        OptionError: the folder cannot be read, or transformers is missing or does not know the
            model.
        LoadError: the folder has another format, a layer that cannot be held, or tensors for which
            the model has no place, or not all that it needs.
    """
    check_path("folder", folder)
    if os.fspath(folder).endswith(".gguf"):
        return load_gguf(folder, model)
    reader = FolderReader(folder)
    format = _format_of(reader)
    if model is None:
        model = meta_model(reader.path, "Pass model=, a model of the class whose folder it is.")
    made = copy_sharing_tensors(model, frozen=True).eval()
    ending = f".{format.packed_name}"
    names = [name.removesuffix(ending) for name in reader.files if name.endswith(ending)]
    inside = tuple(f"{name}." for name in names)
    floats = [key for key in reader.files if not key.startswith(inside)]
    known = stored_parameters([*floats, *(name + WEIGHT for name in names)], made)
    parameter_of = {tensor: key for key, stored in known.items() for tensor in stored.tensors}
    parts: dict[str, dict[str, QuantizedLinear]] = defaultdict(dict)
    rounded: dict[str, float] = {}
    unlike: list[str] = []
    for name in names:
        stored = format.read_layer(reader, name)
        layer = layer_of(name, stored, _bias(reader, name), rounded)
        rounding = format.input_rounding(reader.config[QUANTIZATION], name)
        if rounding is not None and _is_ours(rounding, stored):
            layer.activation = "int8"
        elif rounding is not None:
            unlike.append(name)
        parts[parameter_of.get(name + WEIGHT, name + WEIGHT)][name + WEIGHT] = layer
    for parameter, layers in parts.items():
        if parameter not in known or known[parameter].conversion is None:
            (layer,) = layers.values()
            put_layer(made, parameter.removesuffix(WEIGHT), layer)
        else:
            put_experts(made, known[parameter], layers)
    placeless = [key for key in floats if key not in parameter_of]
    values = {key: s.made(reader.tensor) for key, s in known.items() if key not in parts}
    _load_floats(made, values, placeless, [p.removesuffix(WEIGHT) for p in parts])
    finish_quantized(made)
    if unlike:
        text = f"{len(unlike)} layers, {unlike[0]} among them, read floats: the folder rounds what "
        text += "they read in a way that no layer of fxquant has"
        warnings.warn(text, UserWarning, caller_level())
    warn_of_rounded(rounded)
    return made


def _format_of(reader: FolderReader) -> CheckpointFormat:
    config = reader.config.get(QUANTIZATION) or {}
    method = config.get("quant_method")
    is_packed = method != "compressed-tensors" or config.get("format") == PACKED_FORMAT
    if method in CHECKPOINT_FORMATS and is_packed:
        return CHECKPOINT_FORMATS[method]()
    found = f"a checkpoint quantized by {method!r}" if method else "a float checkpoint"
    raise LoadError(
        str(reader.path),
        found=found if is_packed else f"the format {config.get('format')!r}",
        needed=f"one of {', '.join(CHECKPOINT_FORMATS)} ({PACKED_FORMAT})",
        remedy="Quantize the float model with fxquant.quantize.",
    )


def _is_ours(rounding: Mapping[str, Any], stored: StoredLayer) -> bool:
    """Whether a layer with `activation="int8"` rounds the same groups of its input."""
    columns = stored.q.shape[1]
    size = rounding.get("group_size") if rounding.get("strategy") == "group" else columns
    known = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True}
    return (
        size == min(activation_group(stored.group_size, columns), columns)
        and rounding.get("strategy") in ("group", "token")
        and all(rounding.get(key) == value for key, value in known.items())
    )


def _bias(reader: FolderReader, name: str) -> Tensor | None:
    return reader.tensor(f"{name}.bias") if f"{name}.bias" in reader.files else None


def _load_floats(
    model: nn.Module, tensors: dict[str, Tensor], placeless: list[str], quantized: list[str]
) -> None:
    """Take over all other tensors; the memory of the caller's model is not written.

    Args:
        model: has the quantized layers.
        tensors: by their names in the model.
        placeless: names of the folder's tensors that the model has no place for.
        quantized: names of the layers and parameters that are quantized.
    """
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise _other_class(str(error).strip().splitlines()[-1].strip()) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tie: Any = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    inside = (*(f"{name}." for name in quantized), *(f"{child_name(n)}." for n in quantized))
    known = {id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()
             if key in tensors}  # fmt: skip
    own = model.state_dict(keep_vars=True)
    lost = [key for key in missing if not key.startswith(inside) and id(own[key]) not in known]
    unexpected = [*unexpected, *placeless]
    if lost or unexpected:
        found = f"no tensor {lost[0]}" if lost else f"a tensor {unexpected[0]} without a place"
        raise _other_class(found)


def _other_class(found: str) -> LoadError:
    return LoadError(
        "load_checkpoint",
        found=found,
        needed="a tensor of the folder for each of the model, and no others",
        remedy="Pass a model of the class and configuration whose checkpoint it is.",
    )
