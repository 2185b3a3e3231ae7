"""The INT4 product in C++, for AVX-512, AVX2 and any other CPU: see csrc/.

It is an optional part of the installation: without a compiler it is not built, and other backends
serve. W4A16 multiplies bfloat16 (float32 with AVX2 and without both), W4A8 int8; both sum in
float32 and read one layout. A row's result does not depend on the other rows or on the threads.
"""

import torch
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.kernels.eager import is_plain
from fxquant.kernels.gradient import multiply_with_gradient, needs_gradient
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.native_layout import from_blocks, to_blocks
from fxquant.kernels.reference import REFERENCE
from fxquant.numerics.weights import Int4Weight, quantize_weight_int4

try:  # after torch, whose OpenMP it shares
    from fxquant.kernels import _native
except ImportError as error:
    NOT_BUILT: str | None = f"it was not built when fxquant was installed ({error})"
else:
    NOT_BUILT = None

LARGEST_GROUP = 256
FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LIBRARY = torch.library.Library("fxquant", "DEF")
_LIBRARY.define(
    "linear_int4(Tensor x, Tensor weight, Tensor? bias, int out_features, bool int8_activations)"
    " -> Tensor"
)


@torch.library.impl(_LIBRARY, "linear_int4", "CPU")
def _linear_int4(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, int8_activations: bool
) -> Tensor:
    x = x.contiguous()
    shape, x_type = x.shape, FLOAT_TYPES.get(x.dtype)
    y = x.new_empty(*shape[:-1], out_features)  # separate ints parse faster than a tuple
    bias_address = bias_type = 0
    if bias is not None:
        if bias.dtype not in FLOAT_TYPES or not bias.is_contiguous():
            bias = bias.float().contiguous()
        bias_address, bias_type = bias.data_ptr(), FLOAT_TYPES[bias.dtype]
    if (
        x_type is None
        or (bias is not None and bias.shape != (out_features,))
        or not _native.linear(
            x.data_ptr(),
            shape,
            x_type,
            bias_address,
            bias_type,
            y.data_ptr(),
            weight.data_ptr(),
            weight.shape,
            out_features,
            int8_activations,
            torch.get_num_threads(),
        )
    ):
        raise OptionError(
            "fxquant::linear_int4",
            found=f"{x.dtype} x {list(shape)}, weight {list(weight.shape)} and bias "
            f"{None if bias is None else list(bias.shape)} for {out_features} outputs",
            needed="a float32, bfloat16 or float16 x and a weight packed for its last dimension",
            remedy="Give x the in_features, and bias the out_features, of the layer.",
        )
    return y


def _linear_int4_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int, int8_activations: bool
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


torch.library.register_fake("fxquant::linear_int4", _linear_int4_shape, lib=_LIBRARY)
LINEAR_INT4 = torch.ops.fxquant.linear_int4.default


class NativeBackend:
    """Calls the op `fxquant::linear_int4`."""

    name = "native"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """It is for CPUs and groups that fill 32-bit lanes, and must have passed its check."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if spec.group_size % 8 or spec.group_size > LARGEST_GROUP:
            return f"group_size is {spec.group_size}, not a multiple of 8 up to {LARGEST_GROUP}"
        return FAULT

    def pack(self, weight: Int4Weight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """One tensor with everything: see `native_layout`."""
        return (to_blocks(weight),)

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> Int4Weight:
        """Rearrange the tensor back."""
        return from_blocks(tensors[0], spec)

    def matmul(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Multiply; a gradient of `x` does not change the bits."""
        if needs_gradient(x):
            return multiply_with_gradient(self, x, tensors, spec, bias)
        return self.product(x, tensors, spec, bias)

    def product(
        self, x: Tensor, tensors: tuple[Tensor, ...], spec: LinearSpec, bias: Tensor | None
    ) -> Tensor:
        """Call the op."""
        call = _linear_int4 if is_plain(x) else LINEAR_INT4
        return call(x, tensors[0], bias, spec.out_features, spec.activation == "int8")


NATIVE = NativeBackend()


def find_fault() -> str | None:
    """Multiply a small known layer: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    wave = torch.arange(70 * 72, dtype=torch.float32).sin()
    for symmetric in (True, False):
        for activation in ("float", "int8"):
            spec = LinearSpec(70, 72, 32, symmetric, activation)
            packed = quantize_weight_int4(wave.view(70, 72), spec.group_size, symmetric)
            weight = Int4Weight(*packed, spec.group_size, spec.in_features, symmetric)
            x = wave[: 9 * 72].view(9, 72).bfloat16().float()
            expected = REFERENCE.matmul(x, REFERENCE.pack(weight, spec), spec)
            y = NATIVE.matmul(x, NATIVE.pack(weight, spec), spec)
            if not torch.allclose(y, expected, rtol=0, atol=1e-4):
                return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


FAULT = find_fault()  # once: later calls may run under a fake or meta device
