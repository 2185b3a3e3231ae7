"""Shards of a compressed-tensors folder, made from the folder of the float model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fxquant.exporters.stored_names import WEIGHT
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.exporters.verify import verify_weights
from fxquant.graph.layers import is_plain_linear
from fxquant.modules.layer import QuantizedLayer
from fxquant.numerics.integers import INT8
from fxquant.numerics.quantized_weight import (
    ONE_GROUP,
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
        bits = {d.module: d.bits for d in decisions if d.bits is not None}
        self.pieces = {
            tensor: _Piece(name, rows, bits[name])
            for name in bits
            for tensor, rows in (weights.rows_of(name) or {}).items()
        }
        base, model = self.base, weights.model
        kept = {name: base.dtype(name) for name in base.files if name not in self.pieces}
        tensors = {
            name: torch.empty(base.shape(name), dtype=dtype, device="meta")
            for name, dtype in kept.items()
            if dtype is not None
        }
        modules = dict(model.named_modules())
        linears = [name for name, m in modules.items() if is_plain_linear(m) and name not in bits]
        ignored = dict.fromkeys([*linears, *self._float_matrices(modules)])
        self.source = Source(model, {}, list(ignored), tensors)
        self.format = CompressedTensors(base=base.path)
        self.schemes: dict[str, Scheme] = {}
        for tensor, piece in self.pieces.items():
            scheme = self._scheme(tensor, piece.bits)
            self.schemes[_layer_of(tensor)] = scheme
            if piece.layer in modules:  # readers know it by one name or the other
                self.schemes[piece.layer] = scheme

    def _float_matrices(self, modules: Mapping[str, nn.Module]) -> Iterator[str]:
        """Layers of the folder that stay float and may be linear in a runtime: a router's say."""
        for tensor, name in self.weights.parameter_of.items():
            is_table = isinstance(modules.get(name.rpartition(".")[0]), nn.Embedding)
            is_matrix = tensor.endswith(WEIGHT) and len(self.base.shape(tensor)) == 2
            if is_matrix and not is_table and tensor not in self.pieces:
                yield _layer_of(tensor)

    def shard(
        self,
        folder: UnfinishedFolder,
        number: int,
        names: Sequence[str],
        layers: Mapping[str, QuantizedLayer] | None = None,
        reasons: Mapping[str, str] | None = None,
    ) -> None:
        """Make a shard, unless it is there.

        Args:
            folder: where to.
            number: of the shard.
            names: the float model's tensors that it is made of.
            layers: quantized layers by their names in the model; the others are rounded here, each
                on its own.
            reasons: what there is to say of some layers, by name.

        Raises:
            SaveError: it cannot be written, or a weight does not read back.
        """
        if folder.notes(number) is not None:
            return
        whole = {name: layer.quantized_weight for name, layer in (layers or {}).items()}
        made: dict[str, QuantizedWeight] = {}
        tensors: dict[str, Tensor] = {}
        for tensor in names:
            piece = self.pieces.get(tensor)
            if piece is None:
                tensors[tensor] = self._kept(tensor, layers or {})
                continue
            layer = _layer_of(tensor)
            if piece.layer in whole:
                made[layer] = whole[piece.layer].rows(piece.rows)
            else:
                made[layer] = self._rounded(tensor, piece.bits)
            integers = integer_weight(made[layer])
            for key, part in self.format.layer_tensors(integers, self.source).items():
                tensors[f"{layer}.{key}"] = part.contiguous()
        size = sum(tensor.nbytes for tensor in tensors.values())
        path = folder.write(number, tensors, {"bytes": size, "reasons": dict(reasons or {})})
        written, read = ShardReader(path), self.format.read_layer
        verify_weights(made.items(), lambda name: read(written, name).weight())
        folder.accept(number)

    def reader(self, folder: UnfinishedFolder) -> Callable[[str], Tensor]:
        """Gives the tensors of the float model by name, as the shards that are there hold them."""
        written = _FinishedShards(folder.names())

        def read(tensor: str) -> Tensor:
            if tensor not in self.pieces:
                return written.tensor(tensor)
            weight = self.format.read_layer(written, _layer_of(tensor)).weight()
            return weight.to(self.base.dtype(tensor))

        return read

    def new_config(self) -> dict[str, Any]:
        """What the new config.json says."""
        config = dict(self.base.config)
        config["quantization_config"] = self.format.quantization_config(
            self.schemes, self.source.float_linears
        )
        return config

    def _scheme(self, tensor: str, bits: int) -> Scheme:
        columns = self.base.shape(tensor)[1]
        if is_per_channel(bits, self.config.group_size, columns):
            return Scheme(INT8.bits, None, symmetric=True)
        size = resolved_group_size(self.config.group_size, columns)
        is_row = self.config.group_size == ONE_GROUP or size > columns
        return Scheme(bits, None if is_row else size, self.config.symmetric)

    def _kept(self, tensor: str, layers: Mapping[str, QuantizedLayer]) -> Tensor:
        """A tensor that stays float: the bias of a layer as data corrected it, or the source's."""
        name, _, part = self.weights.parameter_of.get(tensor, tensor).rpartition(".")
        bias = layers[name].bias if part == "bias" and name in layers else None
        if bias is None:
            return self.weights.read(tensor)
        return bias.detach().to(self.base.dtype(tensor)).contiguous()

    def _rounded(self, tensor: str, bits: int) -> QuantizedWeight:
        """A weight rounded alone; in no layer, which would rearrange it for a kernel."""
        weight = self.weights.read(tensor)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        rounded = RoundedLayers(self.config, self.rounding)
        (made,) = rounded.weights(_layer_of(tensor), linear, bits)
        return made


@dataclass(frozen=True)
class _Piece:
    """What a tensor of the folder is of a quantized layer.

    Attributes:
        layer: its name in the model.
        rows: of the layer's weight as a matrix [rows, inputs], in the tensor's order.
        bits: of an integer.
    """

    layer: str
    rows: Tensor
    bits: int


def _layer_of(tensor: str) -> str:
    return tensor.removesuffix(WEIGHT)


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
