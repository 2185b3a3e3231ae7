"""`gradient`: a score for all layers and widths from one forward and a few backwards.

To first order, quantizing layer l alone changes the output by J_l e_l, with e_l the error at the
layer's own output and J_l the Jacobian from there to the output. For random v with E[v vᵀ] = M,
E[(v · J_l e_l)²] = e_lᵀ J_lᵀ M J_l e_l: one backward of v gives J_lᵀ v for every layer at once, and
the square of its product with e_l, averaged over samples, estimates the output's error (Hutchinson,
"A stochastic estimator of the trace of the influence matrix", 1989; the expansion is the
Gauss-Newton term of HAWQ-V2, arXiv:1911.03852, in the space of activations). With n squares the
estimate is off by a share of about sqrt(2 / n), so several v are drawn where samples are few.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.analysis.candidates import Candidate
from fxquant.analysis.exact import Errors
from fxquant.graph.calls import Call
from fxquant.graph.layers import layer_arguments
from fxquant.graph.left_alone import graph_left_alone
from fxquant.measure.output_metric import Metric, probe
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.weight_forms import with_weight
from fxquant.numerics.metrics import squared_sum
from fxquant.passes.padding import fitting_mask, padding_mask, without_padding
from fxquant.passes.rewrite import QuantizeLayer

SQUARES = 96  # that an estimate is the mean of, at least: off by about 0.6 dB
Seen = dict[str, list[tuple[tuple[Any, ...], Tensor]]]  # arguments and output of each call


def measure_gradient(
    gm: GraphModule,
    candidates: Sequence[Candidate],
    bits: Sequence[int],
    calls: Iterable[Call],
    quantize_layer: QuantizeLayer,
    select: Callable[[Any], Tensor],
    metric: Metric = "sqnr",
    advance: Callable[[], object] = lambda: None,
) -> Errors:
    """Estimate the output's error when each candidate is quantized alone.

    The arguments are those of `measure_exact`; no parameter of `gm` may need a gradient. Samples
    are told apart by the first dimension; where a layer's output has another one, the batch counts
    as a single sample.

    Returns:
        The error by name and width, in the metric's unit.
    """
    calls = list(calls)
    rows = sum(call.row_count for call in calls)
    probes = -(-SQUARES // max(rows, 1))
    sums = {c.name: dict.fromkeys(bits, 0.0) for c in candidates}
    weight = 0.0
    generator = torch.Generator().manual_seed(0)
    for index, call in enumerate(calls):
        own = call.clone()
        torch.manual_seed(index)
        seen: Seen = {c.name: [] for c in candidates}
        with torch.enable_grad(), graph_left_alone(gm), _recording(candidates, seen):
            output = select(gm(*own.args, **own.kwargs))
            outputs = [y for pairs in seen.values() for _, y in pairs]
            drawn = []
            mask = padding_mask(call)
            counted = fitting_mask(mask, output)
            for number in range(probes):
                direction = probe(output.detach(), metric, generator)
                if counted is not None:
                    direction[~counted] = 0
                drawn.append(
                    torch.autograd.grad(
                        output,
                        outputs,
                        direction,
                        allow_unused=True,
                        retain_graph=number < probes - 1,
                    )
                )
        (power_of,) = without_padding(mask, output.detach())
        weight += _batch_weight(power_of, metric)
        by_output = {id(y): found for y, *found in zip(outputs, *drawn, strict=True)}
        for candidate in candidates:
            for width in bits:
                made = quantize_layer(candidate.name, candidate.layer, width)
                difference = _weight_error(made, candidate.layer)
                products = [
                    _products(
                        with_weight(candidate.layer, difference, arguments).float(),
                        by_output[id(y)],
                        output.shape[0],
                    )
                    for arguments, y in seen[candidate.name]
                    if by_output[id(y)][0] is not None
                ]
                total = torch.stack(products).sum(0) if products else torch.zeros(1)
                sums[candidate.name][width] += squared_sum(total).item()
            advance()
    weight *= probes
    return {name: {b: v / weight for b, v in row.items()} for name, row in sums.items()}


def _weight_error(quantized: QuantizedLayer, layer: nn.Module) -> Tensor:
    weight = layer.get_parameter("weight").detach()
    return (quantized.dequantize() - weight.float()).to(weight.dtype)


def _products(error: Tensor, gradients: Sequence[Tensor], samples: int) -> Tensor:
    """`_sample_products` of each probe, one after the other."""
    return torch.cat([_sample_products(error, g.float(), samples) for g in gradients])


def _sample_products(error: Tensor, gradient: Tensor, samples: int) -> Tensor:
    """G · e for each sample, [samples], or [1] where samples cannot be told apart."""
    product = error * gradient
    if product.ndim > 1 and product.shape[0] == samples:
        return product.flatten(1).sum(1)
    return product.sum()[None]


def _batch_weight(output: Tensor, metric: Metric) -> float:
    """What the sum of squares is divided by: signal power, or the number of distributions."""
    if metric == "sqnr":
        return squared_sum(output.float()).item()
    return float(output.numel() // output.shape[-1])


@contextmanager
def _recording(candidates: Sequence[Candidate], seen: Seen) -> Any:
    """Note each layer's arguments and output, and let gradients begin at the first layers."""

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            arguments = tuple(
                a.detach().clone() if isinstance(a, Tensor) else a
                for a in layer_arguments(args, kwargs)
            )
            seen[name].append((arguments, output))
            return output.clone()  # the graph may change its value in place

        return hook

    handles = [
        c.layer.register_forward_hook(hook_for(c.name), with_kwargs=True) for c in candidates
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
