"""Quantized layers that multiply in float32 while others are fitted to what they give.

Kernels are made for few rows, and round activations to bfloat16 where a CPU multiplies these. A run
over data has many rows: there most CPUs are faster at dequantizing a weight and multiplying in
float32, and what is fitted does not depend on what kernels the CPU has.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxquant.modules.linear import QuantizedLinear


def multiply_in_float(layer: nn.Module) -> None:
    """Let a quantized linear layer multiply its dequantized weight; others stay as they are."""
    if isinstance(layer, QuantizedLinear) and layer.activation == "float":
        vars(layer)["forward"] = partial(_product, layer)


def multiply_as_made(model: nn.Module) -> None:
    """Undo `multiply_in_float` in all layers of a model."""
    for layer in model.modules():
        own = vars(layer).get("forward")
        if isinstance(own, partial) and own.func is _product:
            del vars(layer)["forward"]


def _product(layer: QuantizedLinear, input: Tensor) -> Tensor:
    """Map `input` [..., in], of any floating dtype, to [..., out] of the same dtype."""
    with torch.autocast(input.device.type, enabled=False):
        x, bias, start = input.float(), layer.bias, 0
        y = x.new_empty(*x.shape[:-1], layer.out_features)
        for weight in layer.weight_parts():
            rows = slice(start, start + len(weight))
            own = None if bias is None else bias[rows].float()
            product = F.linear(x, weight, own)
            if len(weight) == layer.out_features:
                return product.to(input.dtype)
            y[..., rows] = product
            start = rows.stop
        return y.to(input.dtype)
