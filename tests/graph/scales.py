"""Scales of channels, drawn at random."""

import torch
from torch import Tensor

from fxquant.graph.channel_scaling import Scaling


def random_scale(scaling: Scaling) -> Tensor:
    """Scales in 0.3..3.3 [channels], equal within the groups that must share one."""
    return (0.3 + 3 * torch.rand(int(scaling.group_of.max()) + 1))[scaling.group_of]
