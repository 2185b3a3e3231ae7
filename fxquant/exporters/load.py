"""`load_checkpoint`: a model that was quantized elsewhere, in the layers of this package."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import LoadError, caller_level, near_misses
from fxquant.exporters.awq import Awq
from fxquant.exporters.checkpoint import CheckpointFormat
from fxquant.exporters.compressed_tensors import PACKED_FORMAT, CompressedTensors
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.gptq import Gptq
from fxquant.exporters.meta_model import meta_model
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.layers import is_plain_linear
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.grouping import activation_group
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.quantized_weight import SCALE_DTYPE, QuantizedWeight, symmetric_zero_point
from fxquant.swap import finish_quantized

CHECKPOINT_FORMATS: dict[str, type[CheckpointFormat]] = {
    "compressed-tensors": CompressedTensors,
    "gptq": Gptq,
    "awq": Awq,
}
QUANTIZATION = "quantization_config"


class RoundedScalesWarning(UserWarning):
    """Scales in a checkpoint have more digits than our layers store."""


def load_checkpoint(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Load a Hugging Face folder that was quantized elsewhere into the user's class.

    Args:
        folder: with tensors in the format compressed-tensors (pack-quantized), GPTQ or AWQ.
        model: a model of the class whose folder it is, whatever its weights; it is not changed. By
            default the class that the config names is made, which needs transformers.

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
    reader = FolderReader(folder)
    format = _format_of(reader)
    if model is None:
        model = meta_model(reader.path, "Pass model=, a model of the class whose folder it is.")
    made = copy_sharing_tensors(model, frozen=True).eval()
    ending = f".{format.packed_name}"
    names = [name.removesuffix(ending) for name in reader.files if name.endswith(ending)]
    taken: set[str] = set()
    rounded: dict[str, float] = {}
    unlike: list[str] = []
    for name in names:
        stored = format.read_layer(reader, name)
        layer = _layer(name, stored, _bias(reader, name), rounded)
        rounding = format.input_rounding(reader.config[QUANTIZATION], name)
        if rounding is not None and _is_ours(rounding, stored):
            layer.activation = "int8"
        elif rounding is not None:
            unlike.append(name)
        _replace(made, name, layer)
        taken.update(key for key in reader.files if key.startswith(f"{name}."))
    _load_floats(made, reader, taken, names)
    finish_quantized(made)
    if unlike:
        text = f"{len(unlike)} layers, {unlike[0]} among them, read floats: the folder rounds what "
        text += "they read in a way that no layer of fxquant has"
        warnings.warn(text, UserWarning, caller_level())
    if rounded:
        worst = min(rounded, key=rounded.__getitem__)
        text = f"{len(rounded)} layers have scales with more digits than bfloat16, which were "
        text += f"rounded: the weights of {worst} are equal to {rounded[worst]:.0f} dB"
        warnings.warn(text, RoundedScalesWarning, caller_level())
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


def _layer(
    name: str, stored: StoredLayer, bias: Tensor | None, rounded: dict[str, float]
) -> QuantizedLinear:
    """The layer that holds what was stored; notes how close it is where scales were rounded."""
    scales = stored.scales.to(SCALE_DTYPE).float()
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        raise LoadError(
            name,
            found="a scale that is 0, NaN or Inf",
            needed="finite scales other than 0",
            remedy="Make the checkpoint again: such a group of weights carries nothing.",
        )
    middle = symmetric_zero_point(stored.bits)
    is_symmetric = bool((stored.zero_points == middle).all())
    q = stored.q.to(torch.uint8).contiguous()
    grid = scales.contiguous(), stored.zero_points.contiguous()
    weight = QuantizedWeight.from_integers(
        q, *grid, bits=stored.bits, group_size=stored.group_size, symmetric=is_symmetric
    )
    if not torch.equal(scales, stored.scales):
        rounded[name] = sqnr_db(stored.weight(), weight.dequantize())
    return linear_of(weight, bias)


def _replace(model: nn.Module, name: str, layer: QuantizedLinear) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = modules.get(name)
    if linear is None or not is_plain_linear(linear):
        found = "no module of that name" if linear is None else f"a {type(linear).__name__}"
        close = near_misses(name, [n for n, m in modules.items() if is_plain_linear(m)], count=1)
        raise LoadError(
            name,
            found=f"{found} in the model",
            needed="a Linear layer for each quantized one of the folder",
            remedy=f"Pass a model of the class whose checkpoint it is; it has {close}.",
        )
    shape = (linear.out_features, linear.in_features)
    if shape != (layer.out_features, layer.in_features):
        raise LoadError(
            name,
            found=f"a weight of {layer.out_features} x {layer.in_features}",
            needed=f"one of {shape[0]} x {shape[1]}",
            remedy="Pass a model of the configuration whose checkpoint it is.",
        )
    model.set_submodule(name, layer.to(linear.weight.dtype).eval())


def _load_floats(
    model: nn.Module, reader: FolderReader, taken: set[str], quantized: list[str]
) -> None:
    """Take over all other tensors; the memory of the caller's model is not written."""
    tensors = {key: reader.tensor(key) for key in reader.files if key not in taken}
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise _other_class(str(error).strip().splitlines()[-1].strip()) from error
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    tie: Any = getattr(model, "tie_weights", None)
    if callable(tie):
        tie()
    inside = tuple(f"{name}." for name in quantized)
    known = {id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()
             if key in tensors}  # fmt: skip
    own = model.state_dict(keep_vars=True)
    lost = [key for key in missing if not key.startswith(inside) and id(own[key]) not in known]
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
