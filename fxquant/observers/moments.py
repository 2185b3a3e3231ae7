"""What the data say about a layer: moments of its input, and of how far its output must move."""

import torch
from torch import Tensor

MOST_HELD = 4096  # tokens of a layer that are kept to compare results on


class LayerMoments:
    """Sums over tokens of a layer's input x and of the shift that its output lacks.

    The shift of a token is what has to be added to the float layer's output on the quantized
    model's input x to get what the float model has there.

    All sums of products are kept for two halves of the tokens, so that what is learnt from one half
    can be tried on the other. Tokens that are held out are kept apart: they choose nothing, and
    tell which of several results is best.

    Args:
        in_features: the width of x.
        out_features: the width of the layer's output.

    Attributes:
        tokens: how many tokens were added.
        seconds: Σ x xᵀ, float32 [2, in, in], by half.
        crosses: Σ shift xᵀ, float32 [2, out, in], by half.
        total: Σ x, float64 [in].
        total_shift: Σ shift, float64 [out].
        held_tokens: how many tokens were held out; those after the first `MOST_HELD` are dropped.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        self.tokens = self.held_tokens = 0
        self.hessians = torch.zeros(2, in_features, in_features, dtype=torch.float32)
        self.crosses = torch.zeros(2, out_features, in_features, dtype=torch.float32)
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.total_shift = torch.zeros(out_features, dtype=torch.float64)
        self._held: list[tuple[Tensor, Tensor | None]] = []

    def add(self, x: Tensor, shift: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            x: [..., in], what the layer sees in the quantized model.
            shift: [..., out]; None stands for zeros.
            mask: boolean [...], False for tokens that do not count (padding).
        """
        x = _tokens(x, mask)
        middle = len(x) // 2
        halves = (slice(0, middle), slice(middle, None))
        self.tokens += len(x)
        self.total += x.double().sum(0)
        for half, part in enumerate(halves):
            self.hessians[half].addmm_(x[part].T, x[part])
        if shift is None:
            return
        shift = _tokens(shift, mask)
        self.total_shift += shift.double().sum(0)
        for half, part in enumerate(halves):
            self.crosses[half].addmm_(shift[part].T, x[part])

    def hold_out(self, x: Tensor, shift: Tensor | None = None, mask: Tensor | None = None) -> None:
        """Add a batch that choices are measured on; the arguments are those of `add`."""
        room = MOST_HELD - self.held_tokens
        x = _tokens(x, mask)[:room].clone()
        if len(x):
            self.held_tokens += len(x)
            kept = None if shift is None else _tokens(shift, mask)[:room].clone()
            self._held.append((x, kept))

    def held_error(self, weight: Tensor, quantized: Tensor, offset: Tensor) -> float:
        """How far a quantized layer is from its aim: Σ |(Q − W) x + b − shift|² over held tokens.

        Args:
            weight: the float weight W [out, in].
            quantized: Q, dequantized [out, in].
            offset: b, what is added to the float layer's bias, [out].
        """
        change = (quantized.float() - weight.detach().float()).T
        total = 0.0
        for x, shift in self._held:
            error = torch.addmm(offset.float(), x, change)
            total += float((error if shift is None else error - shift).double().square().sum())
        return total

    @property
    def hessian(self) -> Tensor:
        """Σ x xᵀ over all tokens, [in, in]."""
        return self.hessians.sum(0)

    @property
    def importance(self) -> Tensor:
        """The mean square of each input, [in]."""
        return self.hessians.diagonal(dim1=1, dim2=2).sum(0) / max(self.tokens, 1)


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` [in, in] with `damping` times its mean diagonal added to the diagonal.

    Inputs that are always zero get the mean besides: they are on their own, and no error spreads
    from them. Where all inputs are zero, the result is a multiple of the identity.
    """
    result = hessian.clone()
    diagonal = result.diagonal()
    mean = diagonal.mean()
    mean = torch.where(mean > torch.finfo(torch.float32).tiny, mean, 1.0)
    diagonal[diagonal == 0] = mean
    diagonal += damping * mean
    return result


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x if mask is None else x[mask]
    return x.reshape(-1, x.shape[-1]).float()
