"""What the error of a model's output is, and how it adds up over batches."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fxquant.errors import CalibrationError, OptionError
from fxquant.numerics.metrics import squared_sum
from fxquant.passes.padding import without_padding

Metric = str | Callable[[Tensor, Tensor], float]


class OutputError:
    """Accumulates one figure over batches: smaller is better, 0 is no error.

    Args:
        metric: `"sqnr"`: noise power over signal power. `"kl"`: mean KL(float ‖ quantized) in
            nats of logits along the last dimension. A callable `(float, quantized) -> number`:
            its mean over batches.
    """

    def __init__(self, metric: Metric) -> None:
        if not callable(metric) and metric not in ("sqnr", "kl"):
            raise OptionError(
                "metric",
                found=repr(metric),
                needed="'sqnr', 'kl' or a callable of two tensors",
                remedy="Use 'kl' where the output is logits.",
            )
        self.metric = metric
        self._sum = self._weight = 0.0

    def add(self, reference: Tensor, found: Tensor, mask: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            reference: the float model's output.
            found: the quantized model's.
            mask: of the tokens that are no padding, from `padding_mask`. A callable metric gets the
                whole outputs.

        Raises:
            CalibrationError: the two have different shapes, and the metric compares elements.
        """
        if not callable(self.metric) and reference.shape != found.shape:
            raise CalibrationError(
                "the model's output",
                found=f"the shape {tuple(found.shape)} after quantizing a layer, which was "
                f"{tuple(reference.shape)}: it depends on the values of the input",
                needed="outputs that can be compared element by element",
                remedy="Pass select, to compare a tensor of a fixed shape, a metric of your own, "
                "or method='local'.",
            )
        if callable(self.metric):
            self._sum += float(self.metric(reference, found))
            self._weight += 1
            return
        reference, found = without_padding(mask, reference, found)
        if self.metric == "kl":
            p, q = (F.log_softmax(x.float(), dim=-1).flatten(0, -2) for x in (reference, found))
            self._sum += F.kl_div(q, p, log_target=True, reduction="sum").item()
            self._weight += len(p)
        else:
            self._sum += squared_sum(found.float() - reference.float()).item()
            self._weight += squared_sum(reference.float()).item()

    @property
    def value(self) -> float:
        """The error so far; NaN where nothing was added."""
        return self._sum / self._weight if self._weight else math.nan


def probe(reference: Tensor, metric: Metric, generator: torch.Generator) -> Tensor:
    """A random direction v at the output with E[(v · d)²] = the metric's quadratic form of d.

    For SQNR the form is |d|², and v is random signs (Hutchinson). For KL it is dᵀFd / 2 with F the
    Fisher matrix of the softmax: v is (sampled class − probabilities) / √2, whose covariance is
    F / 2 (Martens, "New insights and perspectives on the natural gradient method", 2020).
    """
    if metric == "sqnr":
        signs = torch.randint(0, 2, reference.shape, generator=generator)
        return (signs * 2 - 1).to(reference.dtype)
    if metric == "kl":
        p = F.softmax(reference.float(), dim=-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
        one_hot = torch.zeros_like(p.flatten(0, -2)).scatter_(1, drawn, 1).view_as(p)
        return ((one_hot - p) / math.sqrt(2)).to(reference.dtype)
    raise OptionError(
        "metric",
        found="a callable",
        needed="'sqnr' or 'kl' for the gradient method",
        remedy="Use method='exact' with a metric of your own.",
    )


def db_of(error: float) -> float:
    """A noise-to-signal ratio as SQNR in dB."""
    if math.isnan(error):
        return math.nan
    return -10 * math.log10(error) if error > 0 else math.inf
