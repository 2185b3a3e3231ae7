"""What a layer's input looks like: moments over the tokens of calibration data."""

import torch
from torch import Tensor


class InputMoments:
    """Sums over tokens of a layer's quantized input x, and of how far it is from the float one.

    Args:
        in_features: the width of x.

    Attributes:
        tokens: how many tokens were added.
        second: Σ x xᵀ, float32 [in, in].
        drift: Σ (x_float − x) xᵀ, float32 [in, in].
        total: Σ x, float64 [in].
        total_float: Σ x_float, float64 [in].
    """

    def __init__(self, in_features: int) -> None:
        self.tokens = 0
        self.second = torch.zeros(in_features, in_features)
        self.drift = torch.zeros(in_features, in_features)
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.total_float = torch.zeros(in_features, dtype=torch.float64)

    def add(self, x: Tensor, x_float: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., in], what the layer sees in the quantized model.
            x_float: the same shape, what it sees in the float model.
            mask: boolean [...], False for tokens that do not count (padding).
        """
        if mask is not None:
            x, x_float = x[mask], x_float[mask]
        x, x_float = (v.reshape(-1, v.shape[-1]).float() for v in (x, x_float))
        self.tokens += len(x)
        self.second.addmm_(x.T, x)
        self.drift.addmm_((x_float - x).T, x)
        self.total += x.double().sum(0)
        self.total_float += x_float.double().sum(0)

    @property
    def importance(self) -> Tensor:
        """The mean square of each input, [in]."""
        return self.second.diagonal() / max(self.tokens, 1)
