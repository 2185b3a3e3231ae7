"""compressed-tensors "pack-quantized": a folder that transformers and vLLM read.

Of a layer N, with nibble i of a word the column 8w + i:

- `N.weight_packed`: int32 [out, ceil(in / 8)], values 0..15 (8 bits: four a word, 0..255).
- `N.weight_scale`: [out, groups] in the model's dtype, of either sign.
- `N.weight_shape`: int64 [2].
- `N.weight_zero_point`: int32 [ceil(out / 8), groups], packed along the rows; asymmetric only.

Of activations that are rounded to 8 bits while the model runs the config alone says how many inputs
share a scale (`input_activations`).

Source: https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fxquant.config.targets import TARGETS, WORD
from fxquant.exporters.checkpoint import CheckpointFormat, Scheme, most_common
from fxquant.exporters.findings import Finding
from fxquant.exporters.folder_reader import NamedTensors
from fxquant.exporters.integer_layer import IntegerLayer, integer_layer
from fxquant.exporters.source import Source
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.verify import read_words
from fxquant.exporters.words import pack_rows

PACKED_FORMAT = "pack-quantized"


class CompressedTensors(CheckpointFormat):
    """INT4 and INT8 layers, also mixed."""

    target = TARGETS["compressed-tensors"]
    packed_name = "weight_packed"

    def activation_findings(self, source: Source) -> Iterator[Finding]:
        """Known ranges have no place; of those that are found, who reads them differently."""
        if source.has_static_activations:
            remedy = 'Quantize with observer="dynamic", or without activation_bits.'
            yield Finding("activations", "the format has no grid for each channel of them", remedy)
        rounding = [name for name, m in source.layers.items() if m.activation != "float"]
        for name in rounding:
            layer = integer_layer(source.layers[name])
            size, columns = (layer and layer.activation_group) or 1, source.layers[name].in_features
            if columns % size:
                problem = f"{size} inputs that share a scale do not divide its {columns}"
                yield Finding(name, problem, "Choose another group_size.")
        if rounding:
            problem = "vLLM knows one scale for all inputs of a token, and not one for each group"
            remedy = "transformers reads the folder; for vLLM quantize without activation_bits."
            yield Finding("activations", problem, remedy, is_loss=False)

    def layer_tensors(self, layer: IntegerLayer, source: Source) -> dict[str, Tensor]:
        """Packed integers, scales, the shape, and zero points where they differ."""
        tensors = {
            "weight_packed": pack_rows(layer.q, layer.bits),
            "weight_scale": layer.scales.to(source.dtype),
            "weight_shape": torch.tensor(layer.shape),
        }
        if not layer.symmetric:
            tensors["weight_zero_point"] = pack_rows(layer.zero_points.T, layer.bits).T
        return tensors

    def read_layer(self, folder: NamedTensors, name: str) -> StoredLayer:
        """What the files hold of a layer."""
        rows, columns = folder.tensor(f"{name}.weight_shape").tolist()
        packed = folder.tensor(f"{name}.weight_packed")
        bits = 4 if packed.shape[1] == -(-columns * 4 // WORD) else 8
        q = read_words(packed, bits)[:, :columns]
        scales = folder.tensor(f"{name}.weight_scale").float()
        zero_points = torch.full_like(scales, 2 ** (bits - 1))
        if folder.has(f"{name}.weight_zero_point"):
            words = folder.tensor(f"{name}.weight_zero_point").T
            zero_points = read_words(words, bits)[:, :rows].T.float()
        return StoredLayer(q, scales, zero_points, -(-columns // scales.shape[1]), bits)

    def input_rounding(self, config: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
        """A layer's own name comes before its class."""
        groups = list((config.get("config_groups") or {}).values())
        own = [g for g in groups if any(_is_meant(name, t) for t in g.get("targets") or ())]
        of_class = [g for g in groups if "Linear" in (g.get("targets") or ())]
        found: Mapping[str, Any] | None = None
        for group in (own + of_class)[:1]:
            found = group.get("input_activations")
        return found

    def quantization_config(
        self, schemes: dict[str, Scheme], float_linears: list[str]
    ) -> dict[str, Any]:
        """One group of layers for each scheme; the most common one is that of every Linear."""
        common = most_common(schemes)
        groups = {"group_0": _group(common, ["Linear"])}
        for scheme in dict.fromkeys(schemes.values()):
            if scheme != common:
                targets = [name for name, own in schemes.items() if own == scheme]
                groups[f"group_{len(groups)}"] = _group(scheme, targets)
        return {
            "quant_method": "compressed-tensors",
            "format": PACKED_FORMAT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": float_linears,
            "kv_cache_scheme": None,
        }


def _int8_inputs(size: int) -> dict[str, Any]:
    """Inputs that are rounded while the model runs; so many of a token share a scale."""
    return {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": True,
    }


def _is_meant(name: str, target: str) -> bool:
    return name == target or (target.startswith("re:") and re.match(target[3:], name) is not None)


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": "minmax",
    }
    size = scheme.activation_group
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": size and _int8_inputs(size),
        "output_activations": None,
        "format": PACKED_FORMAT,
    }
