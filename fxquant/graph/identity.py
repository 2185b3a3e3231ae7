"""A cheap fingerprint of a model's float parameters: which model was it that was quantized?"""

import zlib

import torch
from torch import Tensor, nn

FINGERPRINT = "fxquant_fingerprint"  # gm.meta
SAMPLED_ELEMENTS = 64  # elements of a parameter that are looked at


def fingerprint(model: nn.Module) -> dict[str, list[int]]:
    """For each parameter by name: its shape, and a checksum of some of its values.

    Values are compared in bfloat16, so that a model loaded in another dtype is the same model.
    """
    return {name: _of(parameter) for name, parameter in model.named_parameters()}


def _of(parameter: Tensor) -> list[int]:
    data = parameter.detach()
    if data.is_meta or data.layout is not torch.strided or not data.numel():
        return [*data.shape, 0]
    flat = data.reshape(-1) if data.is_contiguous() else data.flatten()
    step = max(1, flat.numel() // SAMPLED_ELEMENTS)
    sample = flat[::step][:SAMPLED_ELEMENTS].cpu()
    if sample.is_floating_point():
        sample = sample.bfloat16().view(torch.int16)
    return [*data.shape, zlib.crc32(bytes(sample.contiguous().view(torch.uint8).tolist()))]


def first_difference(
    known: dict[str, list[int]], model: nn.Module, *, values: bool
) -> tuple[str, str] | None:
    """`(parameter, how it differs)` where `model` is not the one with this fingerprint.

    Args:
        known: what `fingerprint` gave.
        model: another model, or the same.
        values: whether the values have to be the same too, not only names and shapes.
    """
    found = fingerprint(model)
    for name, mark in known.items():
        if name not in found:
            return name, "a parameter that the model does not have"
        if found[name][:-1] != mark[:-1]:
            return name, f"shape {found[name][:-1]} instead of {mark[:-1]}"
        if values and mark[-1] and found[name][-1] != mark[-1]:
            return name, "other values than those that were quantized"
    extra = next((name for name in found if name not in known), None)
    return None if extra is None else (extra, "a parameter that was not there when quantizing")
