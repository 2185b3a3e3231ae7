"""The products with weights of 2 to 8 bits in C++, for AVX-512, AVX2, NEON and others: csrc/.

Float activations are multiplied as bfloat16 (float32 on CPUs that cannot), int8 ones as integers;
both sum in float32 and read one layout. A row's result does not depend on the other rows or on the
threads.
"""

from typing import Any

import torch
from torch import Tensor

from fxquant.errors import OptionError
from fxquant.kernels.code_fields import unit_inputs
from fxquant.kernels.eager import is_plain
from fxquant.kernels.extension import FLOAT_TYPES, NOT_BUILT, _native
from fxquant.kernels.functions import FUNCTIONS, NUMBERS, gate
from fxquant.kernels.gradient import gradients_of_linear, needs_gradient
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.native_layout import (
    from_blocks,
    group_size_of,
    kernel_group,
    rows_of_blocks,
    to_blocks,
)
from fxquant.kernels.reference import REFERENCE
from fxquant.kernels.registration import LIBRARY, implements
from fxquant.numerics.code_books import CODE_BITS, CODE_BOOKS, code_book_of, number_of
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.quantized_weight import QuantizedWeight
from fxquant.numerics.weights import quantize_weight

NEEDED_INPUT = "a float32, bfloat16 or float16 x and a weight packed for its last dimension"
SHAPE_REMEDY = "Give x the in_features, and bias the out_features, of the layer."

LINEAR_SCHEMA = (
    "linear_intn(Tensor x, Tensor weight, Tensor? bias, int in_features, int out_features,"
    " int bits, bool symmetric, bool int8_activations, int code_book=0) -> Tensor"
)


def _multiply(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    symmetric: bool,
    int8_activations: bool,
    code_book: int = 0,
    function: str = "none",
    is_gated: bool = False,
) -> Tensor:
    """The op, for a weight and a bias that a layer owns: where they lie is not checked.

    A function, one of `FUNCTIONS`, is applied to what the op gives; gated, see `functions.gate`.
    """
    x = x.contiguous()
    shape, x_type = x.shape, FLOAT_TYPES.get(x.dtype)
    columns = out_features // 2 if is_gated else out_features
    y = x.new_empty(*shape[:-1], columns)  # separate ints parse faster than a tuple
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
            in_features,
            out_features,
            bits,
            symmetric,
            code_book,
            int8_activations,
            NUMBERS[function],
            is_gated,
            torch.get_num_threads(),
        )
    ):
        raise OptionError(
            "fxquant::linear_intn",
            found=f"{x.dtype} x {list(shape)}, weight {list(weight.shape)} and bias "
            f"{None if bias is None else list(bias.shape)} for {in_features} inputs and "
            f"{out_features} outputs of {bits} bits",
            needed=NEEDED_INPUT,
            remedy=SHAPE_REMEDY,
        )
    return y


@implements(LINEAR_SCHEMA, "CPU")
def _linear_intn(x: Tensor, weight: Tensor, bias: Tensor | None, *form: Any) -> Tensor:
    """The op for any caller, as an exported program that runs where nothing was built."""
    if not weight.is_cpu or weight.dtype != torch.uint8 or not (bias is None or bias.is_cpu):
        raise OptionError(
            "fxquant::linear_intn",
            found=f"a {weight.dtype} weight on {weight.device} and a bias on "
            f"{None if bias is None else bias.device}",
            needed="a torch.uint8 weight and a bias on the CPU",
            remedy="Move the layer to the device of x.",
        )
    if NOT_BUILT is not None:
        spec = _spec_of(weight, *form)
        return REFERENCE.matmul(x, REFERENCE.pack(from_blocks(weight, spec), spec), spec, bias)
    return _multiply(x, weight.contiguous(), bias, *form)


def _spec_of(
    weight: Tensor,
    in_features: int,
    out_features: int,
    bits: int,
    symmetric: bool,
    int8_activations: bool,
    code_book: int = 0,
) -> LinearSpec:
    """What the op's weight was packed for; its groups are the layout's."""
    activation, book = "int8" if int8_activations else "float", code_book_of(code_book)
    group_size = group_size_of(weight, bits, symmetric)
    return LinearSpec(out_features, in_features, group_size, symmetric, activation, bits, book)


def _linear_intn_shape(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_features: int, out_features: int, *form: Any
) -> Tensor:
    torch._check(x.shape[-1] == in_features, lambda: f"x {list(x.shape)}. {SHAPE_REMEDY}")
    return x.new_empty((*x.shape[:-1], out_features))


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, bias, *form = inputs
    ctx.save_for_backward(weight)
    ctx.spec = _spec_of(weight, *form)
    ctx.bias_type = None if bias is None else bias.dtype


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    weight = from_blocks(ctx.saved_tensors[0], ctx.spec).dequantize()
    to_x, to_bias = gradients_of_linear(gradient, weight, ctx.bias_type)
    return to_x, None, to_bias, None, None, None, None, None, None


torch.library.register_fake("fxquant::linear_intn", _linear_intn_shape, lib=LIBRARY)
torch.library.register_autograd(
    "fxquant::linear_intn", _gradients, setup_context=_keep_for_gradient, lib=LIBRARY
)
LINEAR_INTN = torch.ops.fxquant.linear_intn.default


class NativeBackend:
    """Calls the op `fxquant::linear_intn`."""

    name = "native"

    def unsupported(self, spec: LinearSpec, device: torch.device) -> str | None:
        """It is for CPUs and groups of whole units, and must have passed its check."""
        if device.type != "cpu":
            return f"it runs on CPUs, not on {device.type}"
        if kernel_group(spec.group_size, spec.in_features, spec.bits) is None:
            unit = unit_inputs(spec.bits)
            return f"group_size is {spec.group_size}, not a multiple of {unit} (beyond 256, of 32)"
        if FAULT is None and spec.activation == "float" and not IS_VECTORIZED:
            return "it has nothing for this CPU, where torch's products of floats are faster"
        return FAULT

    def pack(self, weight: QuantizedWeight, spec: LinearSpec) -> tuple[Tensor, ...]:
        """One tensor with everything: see `native_layout`."""
        return (to_blocks(weight),)

    def unpack(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> QuantizedWeight:
        """Rearrange the tensor back."""
        return from_blocks(tensors[0], spec)

    def dequantize(self, tensors: tuple[Tensor, ...], spec: LinearSpec) -> Tensor:
        """What `unpack` gives, as float32 [out, in]: the same bits without steps in between."""
        blocks = tensors[0]
        if FAULT is not None or not is_plain(blocks) or not blocks.is_contiguous():
            return from_blocks(blocks, spec).dequantize()
        y = torch.empty(spec.out_features, spec.in_features)
        book = number_of(spec.code_book)
        sizes = spec.in_features, spec.out_features, spec.bits, spec.symmetric, book
        at, threads = blocks.data_ptr(), torch.get_num_threads()
        is_sound = _native.dequantize(at, blocks.shape, *sizes, y.data_ptr(), threads)
        assert is_sound  # `pack` made it
        return y

    def rows(
        self, tensors: tuple[Tensor, ...], spec: LinearSpec, places: Tensor
    ) -> QuantizedWeight:
        """Picks the codes of the rows out of their blocks."""
        return rows_of_blocks(tensors[0], spec, places)

    def matmul(
        self,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Call the op, past the dispatcher where that changes nothing."""
        call = _multiply if is_plain(x) and not needs_gradient(x, bias) else LINEAR_INTN
        return call(x, tensors[0], bias, *_form(spec))

    def matmul_at(
        self,
        x: Tensor,
        rows: Tensor,
        columns: Tensor,
        scales: Tensor | None,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The product with rows that are picked out of `x`; see `Places` in csrc/linear.h.

        Args:
            x: a plain tensor of any shape and strides, floating, or int8 with `scales`.
            rows: int64 [rows], where each starts, in elements from the first of `x`.
            columns: int32 [in], where each column is from there; all lie within `x`.
            scales: of an int8 `x`, whose values are -127 to 127: float32 [rows].
            tensors: what `pack` returned.
            spec: what `pack` was given.
            bias: [out], or None.
            dtype: of the result.

        Returns:
            [rows, out].
        """
        y = torch.empty(len(rows), spec.out_features, dtype=dtype)
        bias = bias if bias is None or bias.dtype in FLOAT_TYPES else bias.float()
        bias = None if bias is None else bias.contiguous()
        is_sound = len(columns) == spec.in_features and _native.linear_at(
            x.data_ptr(),
            FLOAT_TYPES[x.dtype] if scales is None else 0,
            rows.data_ptr(),
            len(rows),
            columns.data_ptr(),
            0 if scales is None else scales.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else FLOAT_TYPES[bias.dtype],
            y.data_ptr(),
            FLOAT_TYPES[dtype],
            tensors[0].data_ptr(),
            tensors[0].shape,
            spec.in_features,
            spec.out_features,
            spec.bits,
            spec.symmetric,
            number_of(spec.code_book),
            scales is not None,
            torch.get_num_threads(),
        )
        assert is_sound  # a layer's own weight
        return y

    def matmul_then(
        self,
        function: str,
        x: Tensor,
        tensors: tuple[Tensor, ...],
        spec: LinearSpec,
        bias: Tensor | None = None,
        is_gated: bool = False,
    ) -> Tensor:
        """One of `FUNCTIONS` of the product, applied while that is in the cache.

        Gated, it is that of one half times the other (see `functions.gate`). For tracers and
        gradients these are ops of their own.
        """
        if is_plain(x) and not needs_gradient(x, bias):
            return _multiply(x, tensors[0], bias, *_form(spec), function, is_gated)
        product = LINEAR_INTN(x, tensors[0], bias, *_form(spec))
        return gate(product, function) if is_gated else FUNCTIONS[function](product)


def _form(spec: LinearSpec) -> tuple[int, int, int, bool, bool, int]:
    """The op's last arguments."""
    int8_activations, book = spec.activation == "int8", number_of(spec.code_book)
    return spec.in_features, spec.out_features, spec.bits, spec.symmetric, int8_activations, book


NATIVE = NativeBackend()


def self_test() -> str | None:
    """Multiply a small known layer: why the extension cannot be trusted here, or None."""
    if NOT_BUILT is not None:
        return NOT_BUILT
    wave = torch.arange(70 * 72, dtype=torch.float32, device="cpu").sin()
    x = wave[: 9 * 72].view(9, 72).bfloat16().float()
    forms: list[tuple[int, bool, str | None]] = [(bits, True, None) for bits in WIDTHS]
    forms += [(bits, False, None) for bits in WIDTHS]
    forms += [(CODE_BITS, True, book) for book in CODE_BOOKS]
    for bits, symmetric, book in forms:
        weight = quantize_weight(wave.view(70, 72), bits, 32, symmetric, code_book=book)
        for activation in ("float", "int8"):
            spec = LinearSpec(70, 72, 32, symmetric, activation, bits, book)
            expected = REFERENCE.matmul(x, REFERENCE.pack(weight, spec), spec)
            y = NATIVE.matmul(x, NATIVE.pack(weight, spec), spec)
            if not torch.allclose(y, expected, rtol=0, atol=1e-4):
                return f"it computes wrong results on this CPU ({_native.instruction_sets()[0]})"
    return None


IS_VECTORIZED = NOT_BUILT is None and _native.instruction_sets() != ["portable"]
FAULT = self_test()  # once: later calls may run under a fake or meta device
