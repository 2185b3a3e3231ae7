"""Tensors into the safetensors files of a Hugging Face folder: shards and their index."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fxquant.exporters.folder_reader import INDEX, WEIGHTS

METADATA = {"format": "pt"}


def write_shards(folder: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """Write `tensors` in their order; one shard at a time is in memory.

    Args:
        folder: where to.
        tensors: by name.
        max_shard_bytes: of a file; a tensor that is larger has a file of its own.
    """
    shards: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    size = total = 0
    for name, tensor in tensors:
        if waiting and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write(folder, len(shards), waiting))
            size = 0
        # A copy: safetensors refuses tensors that share memory.
        waiting[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    shards.append(_write(folder, len(shards), waiting))
    for number in range(len(shards)):
        (folder / _temporary(number)).rename(folder / shard_name(number, len(shards)))
    write_index(folder, shards, total)


def shard_name(number: int, count: int) -> str:
    """What the shard of this number, from 0, is called among `count`."""
    return WEIGHTS if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"


def write_index(folder: Path, shards: Sequence[Iterable[str]], total_bytes: int) -> None:
    """Write which shard holds which tensor; a single file needs no index.

    Args:
        folder: of the shards.
        shards: the names of the tensors in each.
        total_bytes: of all tensors.
    """
    if len(shards) == 1:
        return
    files = {
        name: shard_name(number, len(shards))
        for number, names in enumerate(shards)
        for name in names
    }
    index = {"metadata": {"total_size": total_bytes}, "weight_map": files}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> list[str]:
    save_file(tensors, folder / _temporary(number), METADATA)
    names = list(tensors)
    tensors.clear()
    return names


def _temporary(number: int) -> str:
    return f"shard-{number}"  # how many there will be is known at the end
