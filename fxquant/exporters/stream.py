"""Quantize a Hugging Face folder tensor by tensor: the model is never in memory as a whole.

The folder's config says what the layers are called (the model is made on the meta device, without
weights), the rules decide about them, and each tensor is read, rounded if it is the weight of a
chosen layer, and written. A killed run is gone on with; see `unfinished.py`.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.config.method import parse_method
from fxquant.config.quant_config import QuantConfig, as_config
from fxquant.errors import OptionError
from fxquant.exporters.checkpoint import Scheme, copy_other_files
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.folder_reader import CONFIG, FolderReader, ShardReader
from fxquant.exporters.integer_layer import integer_layer
from fxquant.exporters.meta_model import meta_model
from fxquant.exporters.source import Source
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.exporters.verify import verify_weights
from fxquant.graph.layers import is_plain_linear
from fxquant.measure.quantization_info import QuantizationInfo
from fxquant.measure.sizes import MEGABYTE
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.integers import INT8
from fxquant.numerics.quantized_weight import is_per_channel, resolved_group_size
from fxquant.passes.decide import Decision, decide
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.tracing.opaque import graph_around

SHARD_BYTES = 256 * 10**6  # of the float tensors that a file is made of


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: QuantConfig | Mapping[str, Any] | str | Path | None = None,
    data: Iterable[object] | None = None,
    *,
    resume: bool = True,
) -> QuantizationInfo:
    """Quantize a folder of any size into another, without the model in memory.

    Weights are rounded one by one, by `"rtn"` or `"hqq"`. The result is a compressed-tensors
    folder, which transformers and vLLM read; each weight is read back before its file counts.
    What the format cannot hold is avoided, as with `target="compressed-tensors"`.

    Args:
        source: a folder that `save_pretrained` wrote, with safetensors.
        target: the new folder; free, or an empty folder. Until all of it is written it is called
            `TARGET.unfinished`.
        config: as in `quantize`.
        data: None; fitting to data needs the model, see `quantize`.
        resume: whether to go on with what an interrupted run of the same call left. The files have
            the same bits then.

    Returns:
        The record, without figures of accuracy.

    Raises:
        OptionError: an option or the source is not usable, or there is data.
        SaveError: the target cannot be written, or a weight does not read back.
    """
    made = _for_folder(as_config(config, {}), data)
    recipe = parse_method(made.method, has_data=False)
    base = FolderReader(source)
    decisions, model = _decided(base, made)
    stream = _Stream(base, model, decisions, made, recipe.rounding)
    shards = _shards(base)
    unfinished = UnfinishedFolder(Path(target), stream.identity(), len(shards), resume=resume)
    sizes = [stream.shard(unfinished, number, names) for number, names in enumerate(shards)]
    copy_other_files(base.path, unfinished.path)
    text = json.dumps(stream.new_config(), indent=2) + "\n"
    (unfinished.path / CONFIG).write_text(text, "utf-8")
    unfinished.finish(sum(sizes))
    return QuantizationInfo(
        decisions,
        config=made,
        method=recipe.name,
        original_size_mb=sum(base.nbytes(name) for name in base.files) / MEGABYTE,
        quantized_size_mb=sum(sizes) / MEGABYTE,
    )


class _Stream:
    """Makes the tensors of the new folder."""

    def __init__(
        self,
        base: FolderReader,
        model: nn.Module,
        decisions: list[Decision],
        config: QuantConfig,
        rounding: str,
    ) -> None:
        self.base, self.config, self.rounding = base, config, rounding
        self.bits = {d.module: d.bits for d in decisions if d.bits is not None}
        linears = [name for name, m in model.named_modules() if is_plain_linear(m)]
        kept = {n: base.dtype(n) for n in base.files if n.removesuffix(".weight") not in self.bits}
        tensors = {
            name: torch.empty(base.shape(name), dtype=dtype, device="meta")
            for name, dtype in kept.items()
            if dtype is not None
        }
        float_linears = [name for name in linears if name not in self.bits]
        self.source = Source(model, {}, float_linears, tensors)
        self.format = CompressedTensors(base=base.path)
        self.schemes = {name: self._scheme(name) for name in self.bits}

    def identity(self) -> dict[str, Any]:
        """What a run is made of: an interrupted one is gone on with if this is the same."""
        files = [self.base.path / file for file in dict.fromkeys(self.base.files.values())]
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        return {"files": stats, "config": self.base.config, "options": self.config.to_dict()}

    def shard(self, folder: UnfinishedFolder, number: int, names: list[str]) -> int:
        """Make a shard, unless it is there; the bytes of its tensors."""
        known = folder.notes(number)
        if known is not None:
            return int(known["bytes"])
        tensors: dict[str, Tensor] = {}
        layers = {}
        for full_name in names:
            name, _, part = full_name.rpartition(".")
            if part != "weight" or name not in self.bits:
                tensors[full_name] = self._tensor(full_name)
                continue
            layers[name] = layer = self._quantized(name)
            integers = integer_layer(layer)
            assert integers is not None  # all that are made here are known
            for key, tensor in self.format.layer_tensors(integers, self.source).items():
                tensors[f"{name}.{key}"] = tensor.contiguous()
        size = sum(tensor.nbytes for tensor in tensors.values())
        written = ShardReader(folder.write(number, tensors, {"bytes": size}))
        read = self.format.read_layer
        verify_weights(layers.items(), lambda name: read(written, name).weight())
        folder.accept(number)
        return size

    def new_config(self) -> dict[str, Any]:
        """What the new config.json says."""
        config = dict(self.base.config)
        config["quantization_config"] = self.format.quantization_config(
            self.schemes, self.source.float_linears
        )
        return config

    def _scheme(self, name: str) -> Scheme:
        columns = self.base.shape(f"{name}.weight")[1]
        if is_per_channel(self.bits[name], self.config.group_size, columns):
            return Scheme(INT8.bits, None, symmetric=True)
        size = resolved_group_size(self.config.group_size, columns)
        return Scheme(self.bits[name], None if size >= columns else size, self.config.symmetric)

    def _tensor(self, name: str) -> Tensor:
        """A tensor of the source; its file is not kept open, whose pages would count as memory."""
        return ShardReader(self.base.path / self.base.files[name]).tensor(name)

    def _quantized(self, name: str) -> QuantizedLinear:
        weight = self._tensor(f"{name}.weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        layers = RoundedLayers(self.config, self.rounding)
        made = layers.quantize(name, linear, self.bits[name])
        assert isinstance(made, QuantizedLinear)  # it was made of one
        return made


def _for_folder(config: QuantConfig, data: object) -> QuantConfig:
    """The config, kept to what the format of the new folder can hold."""
    if data is not None:
        raise OptionError(
            "quantize_checkpoint",
            found="calibration data",
            needed="weights alone to be quantized, each on its own",
            remedy="Load the model, call fxquant.quantize with the data, and fxquant.export.",
        )
    name = CompressedTensors.target.name
    if config.target not in (None, name):
        raise OptionError(
            "target",
            found=repr(config.target),
            needed=f"{name!r}, the format of the new folder",
            remedy="Leave it out, or load the model, quantize it and call fxquant.export.",
        )
    return config.changed(target=name)


def _decided(base: FolderReader, config: QuantConfig) -> tuple[list[Decision], nn.Module]:
    """The decisions on the folder's layers, and the model without weights."""
    if "quantization_config" in base.config:
        raise OptionError(
            f"the folder {os.fspath(base.path)!r}",
            found="a model that is quantized already",
            needed="a float model",
            remedy="Name the folder of the float model.",
        )
    model = meta_model(base.path)
    decisions = decide(graph_around(model, None), config)
    if all(decision.bits is None for decision in decisions):
        raise OptionError(
            "config",
            found="rules that leave every layer float",
            needed="a layer that is quantized",
            remedy="Choose a group_size that divides the layers' inputs, or skip fewer layers.",
        )
    for decision in decisions:
        weight = f"{decision.module}.weight"
        is_there = weight in base.files and base.shape(weight) == decision.shape
        if decision.bits is not None and not is_there:
            raise OptionError(
                decision.module,
                found=f"no tensor {weight} of shape {list(decision.shape)} in the folder",
                needed="each chosen layer's weight under the layer's name",
                remedy="Leave it float with modules_to_not_convert, or load the model and call "
                "fxquant.quantize.",
            )
    return decisions, model


def _shards(base: FolderReader) -> list[list[str]]:
    """Which tensors of the source go into which file, in their order."""
    shards: list[list[str]] = [[]]
    size = 0
    for name in base.files:
        if shards[-1] and size + base.nbytes(name) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += base.nbytes(name)
    return shards
