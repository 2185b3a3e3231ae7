"""An embedding whose rows are dequantized when they are looked up."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from fxquant.modules.layer import LayerAround
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.quantized_weight import QuantizedWeight


class QuantizedEmbedding(LayerAround):
    """`nn.Embedding` on a packed weight; a tied head is the same object as its `table`.

    Args:
        num_embeddings: rows of the weight.
        embedding_dim: columns of the weight.
        padding_idx: as in `nn.Embedding`; what is looked up does not depend on it.
        table: the rows, as a quantized linear layer of `embedding_dim` inputs.
    """

    replaces: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    table: QuantizedLinear

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        table: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        empty = nn.Linear(embedding_dim, num_embeddings, bias=False, device="meta")
        self.add_module("table", empty if table is None else table)

    @classmethod
    def of(
        cls, embedding: nn.Embedding, weight: QuantizedWeight, table: QuantizedLinear | None
    ) -> "QuantizedEmbedding":
        """The quantized form of `embedding`.

        Args:
            embedding: the float layer.
            weight: its rows [num_embeddings, embedding_dim].
            table: a layer that holds these rows already, such as a tied head.
        """
        table = table or linear_of(weight, None, embedding.weight.dtype)
        entries, dim = table.weight_shape
        return cls(entries, dim, embedding.padding_idx, table)

    @property
    def activation_arithmetic(self) -> str | None:
        """None: rows are looked up."""
        return None

    @property
    def inner(self) -> QuantizedLinear:
        """The table of rows."""
        return self.table

    @property
    def bias(self) -> None:  # type: ignore[override]
        """An embedding has none."""
        return None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`(num_embeddings, embedding_dim)`."""
        return self.table.weight_shape

    def forward(self, input: Tensor) -> Tensor:
        """Map whole numbers [...] to rows [..., embedding_dim] in the dtype of the float layer's.

        Raises:
            IndexError: a number is negative, or not below `num_embeddings`.
        """
        # Layouts have room behind the last row: that a row exists is checked on a plain range.
        known = torch.arange(self.num_embeddings, device=input.device)
        places = known.index_select(0, input.reshape(-1))
        rows = self.table.rows(places).to(self._weight_dtype)
        return rows.view(*input.shape, self.embedding_dim)

    def to_float(self) -> nn.Embedding:
        """A float `nn.Embedding` with the same rows."""
        shape = (self.num_embeddings, self.embedding_dim)
        made = nn.Embedding(*shape, padding_idx=self.padding_idx, device="meta")
        made.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        return made.eval()

    def extra_repr(self) -> str:
        """The shape, for printing a model."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
