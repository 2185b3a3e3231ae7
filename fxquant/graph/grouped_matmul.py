"""The product of a mixture of experts, in place of library ops that a saved graph must not need."""

import torch
from torch import Tensor

from fxquant.graph.structures import graph_function


@graph_function
def grouped_matmul(input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Multiply rows that are sorted by expert with their expert's matrix.

    Args:
        input: [rows, in].
        weight: [experts, in, out].
        offsets: [experts], where each expert's rows end.

    Returns:
        [rows, out]; rows behind the last offset are 0.
    """
    output = input.new_zeros(input.shape[0], weight.shape[2])
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if end > start:
            output[start:end] = torch.mm(input[start:end], weight[expert])
        start = end
    return output


# Ops by name, so that the library that registers them need not be imported.
LIBRARY_OPS = {"transformers.grouped_mm_fallback.default": grouped_matmul}
