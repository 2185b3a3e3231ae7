"""compressed-tensors "pack-quantized": a folder that transformers and vLLM read.

Of a layer N, with nibble i of a word the column 8w + i:

- `N.weight_packed`: int32 [out, ceil(in / 8)], values 0..15 (8 bits: four a word, 0..255).
- `N.weight_scale`: [out, groups] in the model's dtype, of either sign.
- `N.weight_shape`: int64 [2].
- `N.weight_zero_point`: int32 [ceil(out / 8), groups], packed along the rows; asymmetric only.

Source: https://github.com/vllm-project/compressed-tensors, `compressors/pack_quantized`.
"""

from typing import Any

import torch
from torch import Tensor

from fxquant.config.targets import TARGETS, WORD
from fxquant.exporters.checkpoint import CheckpointFormat, Scheme, most_common
from fxquant.exporters.folder_reader import NamedTensors
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.exporters.source import Source
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.verify import read_words
from fxquant.exporters.words import pack_rows

PACKED_FORMAT = "pack-quantized"


class CompressedTensors(CheckpointFormat):
    """INT4 and INT8 layers, also mixed."""

    target = TARGETS["compressed-tensors"]
    packed_name = "weight_packed"

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
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
        "format": PACKED_FORMAT,
    }
