"""AWQ "gemm" checkpoints, as AutoAWQ writes them and vLLM and transformers read them.

Of a layer N, with nibble i of word j the column 8j + [0, 2, 4, 6, 1, 3, 5, 7][i]:

- `N.qweight`: int32 [in, out / 8].
- `N.qzeros`: int32 [groups, out / 8].
- `N.scales`: float16 [groups, out], of either sign.

Source: https://github.com/casper-hansen/AutoAWQ, `modules/linear/gemm.py`.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxquant.config.targets import TARGETS
from fxquant.exporters.checkpoint import CheckpointFormat, Scheme, most_common
from fxquant.exporters.findings import Finding
from fxquant.exporters.folder_reader import FolderReader
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.exporters.source import Source
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.verify import read_words
from fxquant.exporters.words import AWQ_ORDER, pack_rows

COLUMN_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # in which nibble each of eight columns is


class Awq(CheckpointFormat):
    """INT4 layers of one group size."""

    target = TARGETS["awq"]
    packed_name = "qweight"

    def source_findings(self, schemes: dict[str, Scheme]) -> Iterator[Finding]:
        """The config has one group size for all layers."""
        common = most_common(schemes).group_size if schemes else None
        for name, scheme in schemes.items():
            if scheme.group_size != common:
                found = f"groups of {scheme.group_size or 'a whole row'}"
                problem = f"{found}, and the format has one size for all layers: {common}"
                yield Finding(name, problem, "Quantize with one group_size.")

    def layer_tensors(self, layer: IntegerLayer, source: Source) -> dict[str, Tensor]:
        """Packed integers and zero points, and scales."""
        return {
            "qweight": pack_rows(layer.q.T, 4, AWQ_ORDER),
            "qzeros": pack_rows(layer.zero_points.T, 4, AWQ_ORDER),
            "scales": layer.scales.T.to(torch.float16),
        }

    def read_layer(self, folder: FolderReader, name: str) -> StoredLayer:
        """What the files hold of a layer."""
        q = read_words(folder.tensor(f"{name}.qweight"), 4, COLUMN_PLACES)  # [in, out]
        zero_points = read_words(folder.tensor(f"{name}.qzeros"), 4, COLUMN_PLACES).float()
        scales = folder.tensor(f"{name}.scales").float()  # [groups, out]
        return StoredLayer(q.T, scales.T, zero_points.T, len(q) // len(scales), 4)

    def quantization_config(
        self, schemes: dict[str, Scheme], float_linears: list[str]
    ) -> dict[str, Any]:
        """The one scheme, and the layers left float."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": most_common(schemes).group_size or -1,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": float_linears,
        }
