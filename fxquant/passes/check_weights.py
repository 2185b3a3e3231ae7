"""Refuse weights that cannot be quantized, before any data runs."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import GraphModule

from fxquant.errors import WeightError
from fxquant.graph.layers import sites


def check_weights(gm: GraphModule, names: Iterable[str]) -> None:
    """Raise a `WeightError` that names the first weight that is on meta or not finite."""
    wanted = set(names)
    for site in sites(gm):
        if site.name not in wanted:
            continue
        wanted.discard(site.name)
        weight = site.module.weight
        assert isinstance(weight, torch.Tensor)  # the layers that were chosen have one
        if weight.is_meta:
            raise _without_values(f"{site.name}.weight")
        bad = weight.numel() - int(torch.isfinite(weight).sum())
        if bad:
            raise WeightError(
                f"{site.name}.weight",
                found=f"NaN or Inf in {bad} of {weight.numel()} elements",
                needed="finite values",
                remedy="Check the checkpoint that the model was loaded from.",
            )


def check_has_values(model: nn.Module) -> None:
    """Raise a `WeightError` that names the first parameter that is on meta."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise _without_values(name)


def _without_values(name: str) -> WeightError:
    return WeightError(
        name,
        found="a tensor on the meta device, which has no values",
        needed="a weight with values",
        remedy="Load the checkpoint into the model before quantizing it (fxquant.plan needs no "
        "values), or quantize its folder with fxquant.quantize_checkpoint.",
    )
