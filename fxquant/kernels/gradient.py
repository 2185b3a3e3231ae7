"""A gradient for ops that have none of their own: going back, the weight is dequantized."""

from typing import Any, Protocol

import torch
from torch import Tensor

from fxquant.kernels.interface import LinearSpec, check_input
from fxquant.numerics.quantized_weight import QuantizedWeight


class Product(Protocol):
    """What is needed of a backend."""

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """The weight."""

    def product(
        self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """The product x · weightᵀ + bias, without a gradient."""


def needs_gradient(x: Tensor, bias: Tensor | None) -> bool:
    """Whether autograd records what happens to `x` or `bias`."""
    has_gradient = x.requires_grad or (bias is not None and bias.requires_grad)
    return has_gradient and torch.is_grad_enabled()


def gradients_of_linear(
    gradient: Tensor, weight: Tensor, bias_type: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """From the gradient of y [..., out], those of x [..., in] and, given its dtype, of the bias."""
    to_x = (gradient.float() @ weight).to(gradient.dtype)
    if bias_type is None:
        return to_x, None
    return to_x, gradient.reshape(-1, gradient.shape[-1]).float().sum(0).to(bias_type)


def checked_product(
    backend: Product, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec, bias: Tensor | None
) -> Tensor:
    """The backend's product, with gradients for `x` and `bias`, which do not change its bits.

    Raises:
        OptionError: `x` does not fit the weight.
    """
    check_input(x, spec.in_features, spec.bits)
    if needs_gradient(x, bias):
        return _Multiply.apply(backend, spec, x, bias, *tensors)  # type: ignore[no-untyped-call]
    return backend.product(x, tensors, spec, bias)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: Product,
        spec: LinearSpec,
        x: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        ctx.backend, ctx.spec, ctx.bias_type = backend, spec, None if bias is None else bias.dtype
        ctx.save_for_backward(*tensors)
        return backend.product(x, tensors, spec, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        weight = ctx.backend.unpack(ctx.saved_tensors, ctx.spec).dequantize()
        to_x, to_bias = gradients_of_linear(gradients[0], weight, ctx.bias_type)
        return None, None, to_x, to_bias, *[None] * len(ctx.saved_tensors)
