"""An embedding bag whose rows are dequantized when they are looked up, and then reduced."""

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError, check_choice
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.quantized_weight import QuantizedWeight

POOLINGS = ("sum", "mean", "max")


class QuantizedEmbeddingBag(QuantizedEmbedding):
    """`nn.EmbeddingBag` on a packed weight: the rows of each bag are summed, or the like.

    Args:
        num_embeddings: rows of the weight.
        embedding_dim: columns of the weight.
        pooling: `"sum"`, `"mean"` or `"max"` of the rows of a bag, `mode` in `nn.EmbeddingBag`.
        include_last_offset: whether the last offset is the end of the last bag.
        padding_idx: an entry that does not count, or None.
        table: the rows, as a quantized linear layer of `embedding_dim` inputs.

    Raises:
        OptionError: there is no such pooling.
    """

    replaces = (nn.EmbeddingBag,)

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        pooling: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        table: nn.Module | None = None,
    ) -> None:
        check_choice("pooling", pooling, POOLINGS)
        super().__init__(num_embeddings, embedding_dim, padding_idx, table)
        self.pooling, self.include_last_offset = pooling, include_last_offset

    @classmethod
    def of(  # type: ignore[override]
        cls, bag: nn.EmbeddingBag, weight: QuantizedWeight, table: QuantizedLinear | None
    ) -> "QuantizedEmbeddingBag":
        """The quantized form of `bag`; the arguments are those of `QuantizedEmbedding.of`."""
        table = table or linear_of(weight, None, bag.weight.dtype)
        entries, dim = table.weight_shape
        return cls(entries, dim, bag.mode, bag.include_last_offset, bag.padding_idx, table)

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Map bags of whole numbers to [bags, embedding_dim].

        Args:
            input: [bags, length], or [numbers] where offsets tell the bags.
            offsets: where each bag begins, [bags], from 0 on and never falling; None for `input`
                [bags, length].
            per_sample_weights: factors of the rows, in the shape of `input`, for sums alone.

        Raises:
            OptionError: the shapes or the offsets do not belong together.
            IndexError: a number is negative, or not below `num_embeddings`.
        """
        bags, count = self._bags(input, offsets)
        places = input.reshape(-1)
        rows = super().forward(places)
        if per_sample_weights is not None:
            if self.pooling != "sum" or per_sample_weights.shape != input.shape:
                raise OptionError(
                    "per_sample_weights",
                    found=f"shape {list(per_sample_weights.shape)} for a {self.pooling}",
                    needed=f"shape {list(input.shape)}, and the mode 'sum'",
                    remedy="Leave them out, or call the layer as the float one.",
                )
            rows = rows * per_sample_weights.reshape(-1, 1).to(rows.dtype)
        if self.padding_idx is not None:
            kept = places != self.padding_idx
            rows, bags = rows[kept], bags[kept]
        empty = rows.new_zeros(count, self.embedding_dim)
        if self.pooling == "max":
            index = bags[:, None].expand_as(rows)
            return empty.scatter_reduce(0, index, rows, "amax", include_self=False)
        sums = empty.float().index_add(0, bags, rows.float())
        if self.pooling == "mean":
            sums = sums / torch.bincount(bags, minlength=count).clamp_min(1)[:, None]
        return sums.to(rows.dtype)

    def _bags(self, input: Tensor, offsets: Tensor | None) -> tuple[Tensor, int]:
        """The bag that each number belongs to, and how many there are."""
        if input.ndim == 2 and offsets is None:
            count, length = input.shape
            bags = torch.arange(count, device=input.device).repeat_interleave(length)
            return bags, count
        ends = offsets
        if input.ndim == 1 and ends is not None and ends.ndim == 1 and len(ends):
            is_rising = bool((ends[1:] >= ends[:-1]).all())
            if int(ends[0]) == 0 and int(ends[-1]) <= len(input) and is_rising:
                starts = ends[:-1] if self.include_last_offset else ends
                numbers = torch.arange(len(input), device=input.device)
                bags = torch.searchsorted(starts.to(numbers.dtype), numbers, right=True) - 1
                return bags, len(starts)
        raise OptionError(
            "QuantizedEmbeddingBag",
            found=f"numbers of shape {list(input.shape)}, offsets "
            f"{None if offsets is None else offsets.tolist()}",
            needed="numbers [bags, length] without offsets, or numbers [n] with offsets that begin "
            "with 0, never fall and stay within n",
            remedy="Call the layer as the float one.",
        )

    def to_float(self) -> nn.EmbeddingBag:  # type: ignore[override]
        """A float `nn.EmbeddingBag` with the same rows."""
        made = nn.EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.pooling,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
            device="meta",
        )
        made.weight = nn.Parameter(self.dequantize(), requires_grad=False)
        return made.eval()
