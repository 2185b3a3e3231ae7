"""Quantized layers made by hand, and readers of files that know only the formats' descriptions."""

import numpy as np
import torch
from torch import nn

from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.numerics.quantized_weight import QuantizedWeight


def quantized_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}


def int4_layer(out_features, in_features, group_size=32, zero_points=None, scale=0.01):
    """Random integers; scales of both signs; `zero_points` is called with a shape."""
    q = torch.randint(0, 16, (out_features, in_features), dtype=torch.uint8)
    shape = (out_features, -(-in_features // group_size))
    signs = torch.randint(0, 2, shape) * 2 - 1
    scales = ((torch.rand(shape) + 0.5) * scale * signs).bfloat16().float()
    zero = torch.full(shape, 8.0) if zero_points is None else zero_points(shape)
    weight = QuantizedWeight.from_integers(
        q, scales, zero, bits=4, group_size=group_size, symmetric=zero_points is None
    )
    return QuantizedLinearInt4(weight, None)


def whole(shape):
    """Zero points 0..15; each of them occurs."""
    return torch.arange(shape[0] * shape[1]).reshape(shape) % 16 + 0.0


def with_layers(model, make):
    """`model` with each quantized layer replaced by `make(out, in)`, in place."""
    for name, layer in quantized_layers(model).items():
        owner, _, last = name.rpartition(".")
        setattr(model.get_submodule(owner), last, make(layer.out_features, layer.in_features))
    return model


def is_linear(module):
    return isinstance(module, nn.Linear)


def naive_gptq(tensors, name, bits, offset):
    """One number at a time: x[o, i] = scale[g, o] · (q[i, o] − zero[g, o]), g = g_idx[i]."""
    qweight, qzeros, scales, g_idx = (
        tensors[f"{name}.{key}"].numpy() for key in ("qweight", "qzeros", "scales", "g_idx")
    )
    per_word, mask = 32 // bits, 2**bits - 1
    weight = np.empty((qweight.shape[1], len(g_idx)), np.float32)
    for o in range(weight.shape[0]):
        for i in range(weight.shape[1]):
            group = g_idx[i]
            q = int(qweight[i // per_word, o]) >> (bits * (i % per_word)) & mask
            zero = int(qzeros[group, o // per_word]) >> (bits * (o % per_word)) & mask
            weight[o, i] = np.float32(scales[group, o]) * np.float32(q - (zero + offset))
    return torch.from_numpy(weight)


def naive_awq(tensors, name, group_size):
    """As AutoAWQ: column 8j + order[n] is in nibble n of word j."""
    qweight, qzeros, scales = (
        tensors[f"{name}.{key}"].numpy() for key in ("qweight", "qzeros", "scales")
    )
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    weight = np.empty((scales.shape[1], len(qweight)), np.float32)
    for i in range(weight.shape[1]):
        for word in range(qweight.shape[1]):
            for nibble in range(8):
                o, group = 8 * word + order[nibble], i // group_size
                q = int(qweight[i, word]) >> (4 * nibble) & 15
                zero = int(qzeros[group, word]) >> (4 * nibble) & 15
                weight[o, i] = np.float32(scales[group, o]) * np.float32(q - zero)
    return torch.from_numpy(weight)
