"""GPTQ checkpoints, as GPTQModel writes them and vLLM and transformers read them.

Of a layer N:

- `N.qweight`: int32 [in / 8, out], nibble i of row w is input 8w + i (8 bits: four a word).
- `N.qzeros`: int32 [groups, out / 8]: zero points less 1 ("gptq"), or as they are ("gptq_v2").
- `N.scales`: float16 [groups, out], of either sign.
- `N.g_idx`: int32 [in], the group of each input.

Zero points of 0 cannot be stored less 1, so asymmetric layers make a "gptq_v2" checkpoint.
Source: https://github.com/ModelCloud/GPTQModel, `nn_modules/qlinear`.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.config.targets import TARGETS, WORD
from fxquant.errors import LoadError
from fxquant.exporters.checkpoint import CheckpointFormat, Scheme, most_common
from fxquant.exporters.findings import Finding
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.exporters.source import Source
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.verify import read_words
from fxquant.exporters.words import pack_rows

V1, V2 = "gptq", "gptq_v2"


class Gptq(CheckpointFormat):
    """INT4 and INT8 layers, also mixed."""

    target = TARGETS["gptq"]
    packed_name = "qweight"

    def layer_advice(self, name: str, layer: IntegerLayer) -> Iterator[Finding]:
        """Runtimes that are known not to take a layer that the format holds."""
        if not layer.symmetric:
            problem = "vLLM refuses asymmetric GPTQ checkpoints"
            yield Finding(name, problem, "Quantize with symmetric=True.", is_loss=False)

    def layer_tensors(self, layer: IntegerLayer, source: Source) -> dict[str, Tensor]:
        """Packed integers and zero points, scales, and the group of each input."""
        columns = layer.shape[1]
        stored = layer.zero_points - int(_version(source.is_symmetric) == V1)
        return {
            "qweight": pack_rows(layer.q, layer.bits).T,
            "qzeros": pack_rows(stored.T, layer.bits),
            "scales": layer.scales.T.to(torch.float16),
            "g_idx": (torch.arange(columns) // min(layer.group_size, columns)).to(torch.int32),
        }

    def read_layer(self, folder: FolderReader, name: str) -> StoredLayer:
        """What the files hold of a layer.

        Raises:
            LoadError: its columns are in another order than its groups ("act order"), or it has a
                width that is packed otherwise.
        """
        config = folder.config["quantization_config"]
        packed, scales = (folder.tensor(f"{name}.{key}") for key in ("qweight", "scales"))
        bits = WORD * folder.tensor(f"{name}.qzeros").shape[1] // scales.shape[1]
        if bits not in self.target.widths:
            raise LoadError(
                name,
                found=f"a layer of {bits} bits",
                needed="4 or 8 bits",
                remedy="Quantize the float model here.",
            )
        q = read_words(packed.T, bits)  # [out, in]
        size = q.shape[1] // len(scales)
        group = torch.arange(q.shape[1]) // size
        if f"{name}.g_idx" in folder.files and not torch.equal(
            folder.tensor(f"{name}.g_idx").long(), group
        ):
            raise LoadError(
                name,
                found="groups of columns that do not lie side by side (desc_act)",
                needed="the columns of a group side by side",
                remedy="Use a checkpoint that was made with desc_act=False.",
            )
        zero_points = read_words(folder.tensor(f"{name}.qzeros"), bits).float()  # [groups, out]
        zero_points += config.get("checkpoint_format", V1) == V1
        return StoredLayer(q, scales.float().T, zero_points.T, size, bits)

    def quantization_config(
        self, schemes: dict[str, Scheme], float_linears: list[str]
    ) -> dict[str, Any]:
        """The most common scheme for all layers; `dynamic` has the others and those left float."""
        common = most_common(schemes)
        dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in float_linears}
        for name, scheme in schemes.items():
            if scheme != common:
                dynamic[f"+:^{re.escape(name)}$"] = _settings(scheme)
        is_symmetric = all(scheme.symmetric for scheme in schemes.values())
        return {
            "quant_method": "gptq",
            **_settings(common),
            "desc_act": False,
            "lm_head": any(name.endswith("lm_head") for name in schemes),
            "checkpoint_format": _version(is_symmetric),
            "pack_dtype": "int32",
            "dynamic": dynamic,
        }


def _version(is_symmetric: bool) -> str:
    return V1 if is_symmetric else V2


def _settings(scheme: Scheme) -> dict[str, Any]:
    size = -1 if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": size, "sym": scheme.symmetric}
