"""A Hugging Face folder: what compressed-tensors, GPTQ and AWQ have in common.

The folder of the float model says which tensors a checkpoint has and what they are called. Its
tensors are taken over in their order; each quantized layer's weight becomes what the format stores
instead, and float tensors that quantizing changed (channel scales folded into a norm) come from
the quantized model.
"""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from fxquant.config.targets import Target
from fxquant.errors import check_positive_int
from fxquant.exporters.findings import Finding
from fxquant.exporters.folder_reader import CONFIG, FolderReader
from fxquant.exporters.integer_layer import IntegerLayer, integer_layer
from fxquant.exporters.requirements import (
    exact_scales,
    float_activations,
    fused_alike,
    given_base,
    holdable,
    linear_layers_only,
    whole_zero_points,
    within,
)
from fxquant.exporters.shards import write_shards
from fxquant.exporters.source import Source
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.verify import verify_weights
from fxquant.report.atomic import write_folder_atomically

GIGABYTE = 10**9
TIED = "tie_word_embeddings"
# Weights of the float model in any form, which the new folder must not have too.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".index.json", ".pt", ".pth", ".h5", ".msgpack", ".onnx",
            ".onnx_data", ".gguf", ".ot")  # fmt: skip


@dataclass(frozen=True)
class Scheme:
    """How the weight of a layer is quantized, as the formats' configs say it.

    Attributes:
        bits: of an integer.
        group_size: columns a group; None where a row has one scale.
        symmetric: whether zero points are in the middle.
        activation_group: see `IntegerLayer`.
    """

    bits: int
    group_size: int | None
    symmetric: bool
    activation_group: int | None = None

    @classmethod
    def of(cls, layer: IntegerLayer) -> "Scheme":
        """The scheme of `layer`."""
        group_size = None if layer.is_per_row else layer.group_size
        return cls(layer.bits, group_size, layer.symmetric, layer.activation_group)


def most_common(schemes: dict[str, Scheme]) -> Scheme:
    """The scheme of most layers, which a config states once."""
    return Counter(schemes.values()).most_common(1)[0][0]


@dataclass(frozen=True)
class CheckpointFormat(ABC):
    """A format that is a Hugging Face folder; its fields are the options of the export.

    Attributes:
        base: the folder of the float model, with safetensors: the config, the tokenizer and all
            other files but the weights are taken over.
        max_shard_bytes: of a file.
    """

    base: str | os.PathLike[str] | None = None
    max_shard_bytes: int = 5 * GIGABYTE

    target: ClassVar[Target]
    packed_name: ClassVar[str]  # the last part of the name of a layer's integers

    def __post_init__(self) -> None:
        check_positive_int("max_shard_bytes", self.max_shard_bytes)

    def activation_findings(self, source: Source) -> Iterator[Finding]:
        """What the format would lose of quantized activations: all, by default."""
        yield from float_activations(source)

    def layer_advice(self, name: str, layer: IntegerLayer) -> Iterator[Finding]:
        """Runtimes that are known not to take a layer that the format holds."""
        yield from ()

    def source_findings(self, schemes: dict[str, Scheme]) -> Iterator[Finding]:
        """What the format would lose of all layers together."""
        yield from ()

    @abstractmethod
    def layer_tensors(self, layer: IntegerLayer, source: Source) -> dict[str, Tensor]:
        """What is stored of a layer, by the last part of the name."""

    @abstractmethod
    def read_layer(self, folder: FolderReader, name: str) -> StoredLayer:
        """What the files hold of a layer, by code that shares none with the writer."""

    def input_rounding(self, config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        """What a config of the format says of rounding what a layer reads: nothing, by default."""
        return None

    @abstractmethod
    def quantization_config(
        self, schemes: dict[str, Scheme], float_linears: list[str]
    ) -> dict[str, Any]:
        """What config.json says of the quantization."""

    def findings(self, source: Source) -> Iterator[Finding]:
        """What would be lost."""
        yield from linear_layers_only(source, self.target)
        yield from self.activation_findings(source)
        schemes: dict[str, Scheme] = {}
        for name, module in source.layers.items():
            layer = integer_layer(module)
            unknown = list(holdable(name, layer, self.target))
            yield from unknown
            if layer is not None and not unknown:
                schemes[name] = Scheme.of(layer)
                dtype = self.target.stored_dtype(source.dtype)
                yield from whole_zero_points(name, layer, self.target)
                yield from exact_scales(name, layer, dtype, self.target)
                yield from self.layer_advice(name, layer)
        yield from self.source_findings(schemes)
        yield from fused_alike(schemes, source.float_linears)
        if self.base is not None:
            yield from _base_findings(source, FolderReader(self.base), self.target)

    def write(self, source: Source, path: str | os.PathLike[str]) -> None:
        """Write the folder, read it back, put it in place.

        Raises:
            OptionError: `base` is missing or no folder of a float model.
            SaveError: a weight reads back differently, or the folder cannot be written.
        """
        base = FolderReader(
            given_base(
                self.base,
                "the folder of the float model, whose config and names are taken over",
                "Pass base=, a folder that save_pretrained wrote.",
            )
        )
        write_folder_atomically(path, lambda folder: self._fill(Path(folder), source, base))

    def _fill(self, folder: Path, source: Source, base: FolderReader) -> None:
        copy_other_files(base.path, folder)
        schemes: dict[str, Scheme] = {}
        write_shards(folder, self._tensors(source, base, schemes), self.max_shard_bytes)
        config = dict(base.config)
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(
            source.dtype
        ).removeprefix("torch.")
        if any(f"{name}.weight" not in base.files for name in source.layers):
            config[TIED] = False
        config["quantization_config"] = self.quantization_config(schemes, source.float_linears)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        written = FolderReader(folder)
        verify_weights(source.layers.items(), lambda name: self.read_layer(written, name).weight())

    def _tensors(
        self, source: Source, base: FolderReader, schemes: dict[str, Scheme]
    ) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the new checkpoint; notes the scheme of each layer on the way."""
        untied = [f"{n}.weight" for n in source.layers if f"{n}.weight" not in base.files]
        for full_name in (*base.files, *untied):
            name, _, part = full_name.rpartition(".")
            module = source.layers.get(name)
            if module is not None and part == "weight":
                layer = integer_layer(module)
                assert layer is not None  # a finding otherwise
                schemes[name] = Scheme.of(layer)
                for key, tensor in self.layer_tensors(layer, source).items():
                    yield f"{name}.{key}", tensor
                if layer.bias is not None:
                    yield f"{name}.bias", layer.bias
            elif module is None or part != "bias" or module.bias is None:
                own = source.tensors.get(full_name)
                yield full_name, base.tensor(full_name) if own is None else own


def _base_findings(source: Source, base: FolderReader, target: Target) -> Iterator[Finding]:
    """Whether `base` is the folder of the model that was quantized."""
    remedy = "Pass the folder of the float model that was quantized, saved from the same class."
    if "quantization_config" in base.config:
        yield Finding("base", "it is the folder of a quantized model", remedy)
    for name, layer in source.layers.items():
        weight = f"{name}.weight"
        needed = (layer.out_features, layer.in_features)
        if weight not in base.files:
            if base.config.get(TIED) is not True:
                yield Finding(name, f"base has no tensor {weight}", remedy)
        elif base.shape(weight) != needed:
            found = f"{weight} of base is {list(base.shape(weight))}, not {list(needed)}"
            yield Finding(name, f"{found}: not the weight of a Linear", remedy)
        elif layer.bias is not None and bool(layer.bias.any()) and f"{name}.bias" not in base.files:
            problem = "calibration gave it a bias, which the model's class has no place for"
            yield Finding(name, problem, within(target))
    for name, tensor in source.tensors.items():
        if name in base.files and base.shape(name) != tuple(tensor.shape):
            yield Finding(name, "base has another shape of it", remedy)


def copy_other_files(base: Path, folder: Path) -> None:
    """Copy all files of a folder but those with weights."""
    for path in sorted(base.rglob("*")):
        relative = path.relative_to(base)
        is_hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_file() and not is_hidden and not path.name.endswith(WEIGHT_SUFFIXES):
            (folder / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / relative)
