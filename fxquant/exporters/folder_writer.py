"""Shards of a compressed-tensors folder, made from the folder of the float model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.config.quant_config import QuantConfig
from fxquant.exporters.checkpoint import Scheme
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.folder_reader import ShardReader
from fxquant.exporters.integer_layer import integer_weight
from fxquant.exporters.model_weights import ModelWeights
from fxquant.exporters.source import Source
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.exporters.verify import verify_weights
from fxquant.graph.layers import is_plain_linear
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.integers import INT8
from fxquant.numerics.quantized_weight import (
    QuantizedWeight,
    is_per_channel,
    resolved_group_size,
)
from fxquant.passes.decide import Decision
from fxquant.passes.rounded_layers import RoundedLayers


class FolderWriter:
    """Makes the tensors of the new folder.

    Args:
        weights: of the float model.
        decisions: on its layers.
        config: how they are quantized.
        rounding: of layers that are quantized without data, `"rtn"` or `"hqq"`.
    """

    def __init__(
        self, weights: ModelWeights, decisions: list[Decision], config: QuantConfig, rounding: str
    ) -> None:
        self.weights, self.base, self.config = weights, weights.base, config
        self.rounding = rounding
        self.bits = {d.module: d.bits for d in decisions if d.bits is not None}
        base, model = self.base, weights.model
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

    def shard(
        self,
        folder: UnfinishedFolder,
        number: int,
        names: Sequence[str],
        layers: Mapping[str, QuantizedLinear] | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        """Make a shard, unless it is there.

        Args:
            folder: where to.
            number: of the shard.
            names: the float model's tensors that it is made of.
            layers: quantized layers by name; the others are rounded here, each on its own.
            reasons: what there is to say of some layers, by name.

        Raises:
            SaveError: it cannot be written, or a weight does not read back.
        """
        if folder.notes(number) is not None:
            return
        made = {name: layer.quantized_weight for name, layer in (layers or {}).items()}
        tensors: dict[str, Tensor] = {}
        for full_name in names:
            name, _, part = full_name.rpartition(".")
            if part == "weight" and name in self.bits:
                if name not in made:
                    made[name] = self._rounded(name)
                integers = integer_weight(made[name])
                for key, tensor in self.format.layer_tensors(integers, self.source).items():
                    tensors[f"{name}.{key}"] = tensor.contiguous()
            else:
                tensors[full_name] = self._kept(full_name, layers or {})
        size = sum(tensor.nbytes for tensor in tensors.values())
        path = folder.write(number, tensors, {"bytes": size, "reasons": dict(reasons or {})})
        written, read = ShardReader(path), self.format.read_layer
        verify_weights(made.items(), lambda name: read(written, name).weight())
        folder.accept(number)

    def reader(self, folder: UnfinishedFolder) -> Callable[[str], Tensor]:
        """Gives the tensors of the float model by name, as the shards that are there hold them."""
        written = _FinishedShards(folder.names())

        def read(full_name: str) -> Tensor:
            name, _, part = full_name.rpartition(".")
            if part != "weight" or name not in self.bits:
                return written.tensor(full_name)
            weight = self.format.read_layer(written, name).weight()
            return weight.to(self.base.dtype(full_name))

        return read

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

    def _kept(self, full_name: str, layers: Mapping[str, QuantizedLinear]) -> Tensor:
        """A tensor that stays float: the bias of a layer as data corrected it, or the source's."""
        name, _, part = full_name.rpartition(".")
        bias = layers[name].bias if part == "bias" and name in layers else None
        if bias is None:
            return self.weights.read(full_name)
        return bias.detach().to(self.base.dtype(full_name)).contiguous()

    def _rounded(self, name: str) -> QuantizedWeight:
        """A weight rounded alone; in no layer, which would rearrange it for a kernel."""
        weight = self.weights.read(f"{name}.weight")
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        (made,) = RoundedLayers(self.config, self.rounding).weights(name, linear, self.bits[name])
        return made


@dataclass(frozen=True)
class _FinishedShards:
    """The tensors of finished shards, by name; no file is kept open."""

    files: dict[str, Path]

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return ShardReader(self.files[name]).tensor(name)
