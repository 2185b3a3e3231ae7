"""GGUF files, quantized by llama.cpp or exported by fxquant, in the layers of fxquant."""

import os
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fxquant.config.targets import GGUF_BLOCK
from fxquant.errors import LoadError, OptionError
from fxquant.exporters.gguf_file import GgufFile, Permutation
from fxquant.exporters.optional import optional_library
from fxquant.exporters.placing import layer_of, put_layer, warn_of_rounded
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.layers import is_plain_linear
from fxquant.modules.float_linear import as_parameter
from fxquant.swap import finish_quantized

FLOAT_TYPES_OF_GGUF = ("F32", "F16", "BF16")
GGUF_MIDDLES = {"Q4_0": 8, "Q8_0": 128}  # the zero point of types without an offset


def load_gguf(path: str | os.PathLike[str], model: nn.Module | None) -> nn.Module:
    """Load the layers of a file into a copy of the float model that it was made of.

    Args:
        path: of the file.
        model: the float model. What the file has in floats stays as it is here; what it has in
            types that no layer of fxquant has (Q6_K) becomes the float values of the file.

    Raises:
        OptionError: the model is missing, or the file or the library cannot be read.
        LoadError: no layer is quantized in a type that fxquant has, or a weight is not the model's.
    """
    if model is None:
        raise OptionError(
            "model",
            found="nothing",
            needed="the float model that the GGUF file was made of",
            remedy="Pass model=: its weights tell in which order the file has their rows.",
        )
    file = GgufFile(optional_library("gguf", "gguf", "to read GGUF files"), path)
    made = copy_sharing_tensors(model, frozen=True).eval()
    rounded: dict[str, float] = {}
    count = 0
    for name, module in _weighted(model):
        tensor = str(file.weight_name(name))
        kind = file.kind(tensor)
        if kind in FLOAT_TYPES_OF_GGUF:
            continue
        order = _order(file, name, module)
        if kind in (*GGUF_MIDDLES, "Q4_1") and isinstance(module, nn.Linear):
            stored = _stored(file, tensor, kind, order)
            layer = layer_of(name, stored, _bias(file, name, module, order), rounded)
            put_layer(made, name, layer)
            count += 1
        else:
            values = torch.from_numpy(order.undone(file.values(tensor)))
            weight = as_parameter(values.to(module.weight.dtype))
            made.get_submodule(name).register_parameter("weight", weight)
    if not count:
        raise LoadError(
            os.fspath(path),
            found="no layer of the model in Q4_0, Q4_1 or Q8_0",
            needed="a quantized file of the model",
            remedy="Pass another file, or a model of the class that it was made of.",
        )
    finish_quantized(made)
    warn_of_rounded(rounded)
    return made


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Embedding]]:
    """The layers with a matrix of a GGUF file."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding) or (
            isinstance(module, nn.Linear) and is_plain_linear(module)
        ):
            yield name, module


def _order(file: GgufFile, name: str, module: nn.Linear | nn.Embedding) -> Permutation:
    weight = module.weight.detach()
    order = None if weight.is_meta else file.permutation(name, weight.float().cpu().numpy())
    if order is None:
        raise LoadError(
            name,
            found="another weight in the file than in the model",
            needed="the float model that the GGUF file was made of, with its weights",
            remedy="Pass model=, the float model.",
        )
    return order


def _stored(file: GgufFile, tensor: str, kind: str, order: Permutation) -> StoredLayer:
    """The blocks of a weight; see `gguf` for the types."""
    size = GGUF_BLOCK + 2 if kind == "Q8_0" else GGUF_BLOCK // 2 + (4 if kind == "Q4_1" else 2)
    rows = file.blocks(tensor)
    blocks = order.undone(rows.reshape(len(rows), -1, size))
    scales = _float16(blocks[..., :2])
    if kind == "Q8_0":
        q, bits = blocks[..., 2:] ^ 0x80, 8
    else:
        nibbles, bits = blocks[..., -GGUF_BLOCK // 2 :], 4
        q = np.concatenate([nibbles & 0xF, nibbles >> 4], axis=-1)
    if kind in GGUF_MIDDLES:
        zero_points = torch.full_like(scales, GGUF_MIDDLES[kind])
        is_empty = scales == 0  # all weights of the block are 0
        q = np.where(is_empty.numpy()[..., None], np.uint8(GGUF_MIDDLES[kind]), q)
        scales = scales.masked_fill(is_empty, 1)
    else:
        zero_points = -_float16(blocks[..., 2:4]) / scales
    codes = torch.from_numpy(np.ascontiguousarray(q.reshape(len(rows), -1)))
    return StoredLayer(codes, scales, zero_points, GGUF_BLOCK, bits)


def _float16(two: np.ndarray) -> Tensor:
    """Numbers [out, blocks] of their bytes [out, blocks, 2]."""
    values = np.ascontiguousarray(two).view(np.float16)[..., 0]
    return torch.from_numpy(values.astype(np.float32))


def _bias(file: GgufFile, name: str, module: nn.Linear, order: Permutation) -> Tensor | None:
    found = file.bias_name(name)
    if found is None:
        return None if module.bias is None else module.bias.detach()
    return torch.from_numpy(order.undone(file.values(found)[:, None])[:, 0].copy())
