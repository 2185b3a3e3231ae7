"""The C++ kernel. Without a compiler it is not built, and these tests have no instruction sets."""

import concurrent.futures
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from fxquant.errors import OptionError
from fxquant.kernels import native
from fxquant.kernels.choose import choose_backend
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.native import LINEAR_INTN, NATIVE, NOT_BUILT
from fxquant.kernels.native_layout import kernel_group, to_blocks
from fxquant.kernels.reference import REFERENCE, quantize_tokens
from fxquant.numerics.code_books import CODE_BOOKS, number_of
from fxquant.numerics.grouping import activation_group
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.weights import quantize_weight
from tests.compare import BFLOAT16_SETS

CPU = torch.device("cpu")
SETS = native._native.instruction_sets() if NOT_BUILT is None else []
ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
FLOATS = st.sampled_from(list(ULP))
every_set = pytest.mark.parametrize("instructions", SETS)
every_width = pytest.mark.parametrize("bits", WIDTHS)
both_grids = pytest.mark.parametrize("symmetric", [True, False])
both_activations = pytest.mark.parametrize("activation", ["float", "int8"])


@pytest.fixture(autouse=True)
def _fastest_set_afterwards():
    yield
    for name in SETS[:1]:
        native._native.use(name)


def layer(o, i, group_size=32, symmetric=True, activation="float", bits=4, code_book=None):
    spec = LinearSpec(o, i, group_size, symmetric, activation, bits, code_book)
    weight = quantize_weight(torch.randn(o, i), bits, group_size, symmetric, code_book=code_book)
    return spec, weight, NATIVE.pack(weight, spec)


@given(
    o=st.integers(1, 200),
    i=st.integers(1, 300),
    rows=st.integers(0, 20) | st.just(200),
    group_size=st.sampled_from([8, 32, 40, 64, 128, 256, 512, 2048]),
    form=st.tuples(st.just(4) | st.sampled_from(WIDTHS), st.booleans(), st.none())
    | st.tuples(st.just(4), st.just(True), st.sampled_from(list(CODE_BOOKS))),
    activation=st.sampled_from(["float", "int8"]),
    dtype=FLOATS,
    bias_dtype=st.none() | FLOATS,
    zero_row=st.booleans(),
    size=st.sampled_from([1e-3, 1.0, 100.0]),
)
@settings(max_examples=1000, deadline=None)
def test_every_instruction_set_computes_what_float64_computes(
    o, i, rows, group_size, form, activation, dtype, bias_dtype, zero_row, size
):
    bits, symmetric, code_book = form
    assume(kernel_group(group_size, i, bits) is not None)
    spec, weight, tensors = layer(o, i, group_size, symmetric, activation, bits, code_book)
    x = (torch.randn(rows, i) * size + size / 2).to(dtype)
    if rows and zero_row:
        x[0] = 0
    bias = None if bias_dtype is None else torch.randn(o).to(bias_dtype)
    added = torch.zeros(o) if bias is None else bias
    w = weight.dequantize().double()
    for instructions in SETS:
        native._native.use(instructions)
        seen = x.bfloat16() if instructions in BFLOAT16_SETS else x
        if activation == "int8":
            seen = quantize_tokens(x.float(), activation_group(group_size, i))
        expected = seen.double() @ w.T + added
        magnitude = seen.double().abs() @ w.abs().T + added.abs()
        y = NATIVE.matmul(x, tensors, spec, bias)
        assert y.dtype == dtype
        error = (y.double() - expected).abs()
        allowed = 1.01 * ULP[dtype] * expected.abs() + 3e-6 * magnitude + 1e-7
        assert (error <= allowed).all(), instructions


@every_set
@both_grids
@both_activations
@pytest.mark.parametrize(("bits", "group_size"), [(4, 128), (3, 32), (8, 256)])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(
    instructions, symmetric, activation, bits, group_size
):
    native._native.use(instructions)
    spec, _, tensors = layer(1280, 1024, group_size, symmetric, activation, bits)
    x = torch.randn(60, 1024)
    together = NATIVE.matmul(x, tensors, spec)
    assert torch.equal(together, NATIVE.matmul(x, tensors, spec))
    for rows in (1, 3, 6, 7, 39):
        assert torch.equal(NATIVE.matmul(x[:rows], tensors, spec), together[:rows])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = NATIVE.matmul(x, tensors, spec)
    torch.set_num_threads(threads)
    assert torch.equal(alone, together)


@every_set
@both_activations
@pytest.mark.parametrize("rows", [12, 62, 80], ids=["share columns", "and prepare", "share rows"])
def test_every_way_to_share_work_among_threads_gives_the_same_bits(instructions, activation, rows):
    native._native.use(instructions)
    spec, _, tensors = layer(1024, 4608, 128, False, activation)
    x, threads = torch.randn(rows, 4608), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(NATIVE.matmul(x, tensors, spec))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_set
@both_grids
@pytest.mark.parametrize("bad", [[torch.nan], [torch.inf], [-torch.inf], [torch.inf, -torch.inf]])
def test_nan_and_infinity_pass_as_through_a_float_linear(instructions, symmetric, bad):
    native._native.use(instructions)
    spec, weight, tensors = layer(70, 96, 32, symmetric)
    x = torch.randn(3, 96)
    x[1, 40 : 40 + len(bad)] = torch.tensor(bad)
    y, expected = NATIVE.matmul(x, tensors, spec), F.linear(x, weight.dequantize())
    torch.testing.assert_close(y[1], expected[1], equal_nan=True)
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=1e-2, atol=5e-2)


@every_set
@both_grids
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_int8_activations_turn_what_is_not_finite_into_nan(instructions, symmetric, bad):
    native._native.use(instructions)
    spec, _, tensors = layer(70, 96, 32, symmetric, "int8")
    x = torch.randn(3, 96)
    clean = NATIVE.matmul(x, tensors, spec)
    x[1, 40] = bad
    y = NATIVE.matmul(x, tensors, spec)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@every_set
def test_values_at_the_ends_of_a_type_survive(instructions):
    native._native.use(instructions)
    spec, weight, tensors = layer(64, 32)
    for dtype in ULP:
        info = torch.finfo(dtype)
        row = torch.tensor([info.tiny, info.max / 1e4, 0.0, -info.max / 1e4]).to(dtype)
        x = row.repeat(8)[None]
        y = NATIVE.matmul(x, tensors, spec)
        expected = x.double() @ weight.dequantize().double().T
        assert torch.allclose(y.double(), expected, rtol=2e-2, atol=1e-2 * info.max / 1e4)


@pytest.mark.parametrize("instructions", SETS[:1])
@both_activations
def test_the_op_is_registered_properly(instructions, activation):
    spec, _, (packed,) = layer(48, 96, 64)
    for bias in (None, torch.randn(48)):
        for needs_gradient in (False, True):
            x = torch.randn(2, 3, 96, requires_grad=needs_gradient)
            arguments = (x, packed, bias, 96, spec.out_features, 4, True, activation == "int8")
            torch.library.opcheck(LINEAR_INTN, arguments)


@pytest.mark.parametrize("instructions", SETS[:1])
def test_tracers_transforms_and_modes_see_the_op(instructions):
    spec, _, tensors = layer(48, 96, 64)
    x = torch.randn(4, 96)
    expected = NATIVE.matmul(x, tensors, spec)

    def product(value):
        return NATIVE.matmul(value, tensors, spec)

    assert LINEAR_INTN in {node.target for node in make_fx(product)(x).graph.nodes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates the tracer
        traced = torch.jit.trace(product, (torch.zeros_like(x),), check_trace=False)
    assert torch.equal(traced(x), expected)
    assert torch.equal(torch.func.functionalize(product)(x), expected)
    assert torch.equal(torch.vmap(product)(x[:, None])[:, 0], expected)
    with torch.inference_mode():
        assert torch.equal(product(x), expected)
    assert product(x.to("meta")).device.type == "meta"


@pytest.mark.parametrize("instructions", SETS[:1])
def test_inputs_of_any_stride_and_shape_are_read_rightly(instructions):
    spec, _, tensors = layer(48, 96, 64)
    x = torch.randn(96, 5).T
    expected = NATIVE.matmul(x.contiguous(), tensors, spec)
    assert torch.equal(NATIVE.matmul(x, tensors, spec), expected)
    assert torch.equal(NATIVE.matmul(x.expand(2, 5, 96), tensors, spec)[1], expected)
    assert torch.equal(NATIVE.matmul(x[0], tensors, spec), expected[0])
    assert NATIVE.matmul(x[:0], tensors, spec).shape == (0, 48)
    bias = torch.randn(96)[::2]
    torch.testing.assert_close(NATIVE.matmul(x, tensors, spec, bias), expected + bias)
    torch.testing.assert_close(NATIVE.matmul(x, tensors, spec, bias.double()), expected + bias)


@pytest.mark.parametrize("instructions", SETS[:1])
def test_threads_of_python_may_multiply_at_once(instructions):
    spec, _, tensors = layer(1024, 1024, 128)
    inputs = [torch.randn(rows, 1024) for rows in (1, 9, 30, 64) for _ in range(8)]
    expected = [NATIVE.matmul(x, tensors, spec) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: NATIVE.matmul(x, tensors, spec), inputs))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


FORKING = """
import os, warnings
import torch
from fxquant.kernels.interface import LinearSpec
from fxquant.kernels.native import NATIVE
from fxquant.numerics.weights import quantize_weight

warnings.simplefilter("ignore")  # Python warns of forks in threaded processes
torch.set_num_threads(2)
spec = LinearSpec(256, 4096, 128, True)  # few outputs: torch itself hangs on many in the child
tensors = NATIVE.pack(quantize_weight(torch.randn(256, 4096), 4, 128, True), spec)
x = torch.randn(64, 4096)
before = NATIVE.matmul(x, tensors, spec)  # OpenMP's threads exist now
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(NATIVE.matmul(x, tensors, spec), before) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(NATIVE.matmul(x, tensors, spec), before)
"""


@pytest.mark.parametrize("instructions", SETS[:1])
def test_a_forked_process_multiplies_too(instructions):
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=120)


@pytest.mark.parametrize("instructions", SETS[:1])
def test_arguments_that_do_not_fit_say_what_to_give(instructions):
    spec, _, tensors = layer(48, 96, 64)
    remedy = "Give x the in_features, and bias the out_features, of the layer"
    for columns in (95, 97, 200):  # 97 to 128 would fill as many groups
        with pytest.raises(OptionError, match=rf"x \[2, {columns}\].*for 96 inputs.*" + remedy):
            NATIVE.matmul(torch.randn(2, columns), tensors, spec)
    with pytest.raises(OptionError, match=r"bias \[47\].*" + remedy):
        NATIVE.matmul(torch.randn(2, 96), tensors, spec, torch.randn(47))
    with pytest.raises(OptionError, match=r"torch.float64 x.*Expected a float32, bfloat16 or"):
        NATIVE.matmul(torch.randn(2, 96).double(), tensors, spec)
    with pytest.raises(OptionError, match=r"weight \[3, 1000\]"):
        NATIVE.matmul(torch.randn(2, 96), (torch.zeros(3, 1000, dtype=torch.uint8),), spec)
    arguments = (torch.randn(2, 96), tensors[0].int(), None, 96, 48, 4, True, False)
    with pytest.raises(OptionError, match=r"torch.int32 weight.*Move the layer to the device of x"):
        LINEAR_INTN(*arguments)
    with pytest.raises(ValueError, match="no such instruction set"):
        native._native.use("mmx")


@both_grids
@both_activations
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_an_op_that_was_not_built_computes_slowly(symmetric, activation, bits, monkeypatch):
    spec, weight, tensors = layer(48, 96, 64, symmetric, activation, bits)
    monkeypatch.setattr(native, "NOT_BUILT", "it was not built")
    x, bias = torch.randn(3, 96), torch.randn(48)
    y = LINEAR_INTN(x, tensors[0], bias, 96, 48, bits, symmetric, activation == "int8")
    assert torch.equal(y, REFERENCE.matmul(x, REFERENCE.pack(weight, spec), spec, bias))


@pytest.mark.parametrize("instructions", SETS[:1])
@both_grids
def test_gradients_are_those_of_a_float_linear(instructions, symmetric):
    spec, weight, tensors = layer(48, 96, 64, symmetric)
    for x_needs, bias_needs in ((True, True), (True, False), (False, True)):
        inputs = torch.randn(2, 3, 96), torch.randn(48)
        x, bias = (v.requires_grad_(n) for v, n in zip(inputs, (x_needs, bias_needs), strict=True))
        direction = torch.randn(2, 3, 48)
        NATIVE.matmul(x, tensors, spec, bias).backward(direction)
        found = x.grad, bias.grad
        x.grad = bias.grad = None
        F.linear(x, weight.dequantize(), bias).backward(direction)
        torch.testing.assert_close(found, (x.grad, bias.grad))


@pytest.mark.parametrize("instructions", SETS[:1])
def test_a_step_of_training_compiles_without_a_graph_break(instructions):
    spec, _, tensors = layer(48, 96, 64)
    compiled = torch.compile(
        lambda x: NATIVE.matmul(x, tensors, spec).square().sum(),
        backend="aot_eager",
        fullgraph=True,
    )
    one, two = (torch.randn(3, 96, generator=torch.Generator().manual_seed(1)) for _ in range(2))
    compiled(one.requires_grad_()).backward()
    NATIVE.matmul(two.requires_grad_(), tensors, spec).square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


@pytest.mark.parametrize("instructions", SETS[:1])
def test_a_view_that_negates_is_read_negated(instructions):
    spec, _, tensors = layer(48, 96, 64)
    x = torch.randn(3, 96)
    assert torch.equal(
        NATIVE.matmul(torch._neg_view(x), tensors, spec), -NATIVE.matmul(x, tensors, spec)
    )


@every_set
def test_many_rows_of_a_batch_may_hold_infinities(instructions):
    native._native.use(instructions)
    spec, weight, tensors = layer(70, 96, 32, symmetric=False)
    x = torch.randn(400, 96)
    clean = NATIVE.matmul(x, tensors, spec)
    x[::3, 40] = torch.inf
    y, expected = NATIVE.matmul(x, tensors, spec), F.linear(x, weight.dequantize())
    torch.testing.assert_close(y[::3], expected[::3], equal_nan=True)
    assert torch.equal(y[1::3], clean[1::3])


@both_grids
@every_width
def test_the_layout_takes_little_more_than_the_bits_of_its_integers(symmetric, bits):
    weight = quantize_weight(torch.randn(256, 1024), bits, 128, symmetric)
    assert to_blocks(weight).nbytes * 8 / (256 * 1024) == bits + (0.125 if symmetric else 0.25)


@both_grids
@every_width
@pytest.mark.parametrize(("group_size", "columns"), [(64, 800), (384, 800), (300, 300), (8, 8)])
def test_every_width_and_size_of_group_comes_back_from_the_layout(
    symmetric, bits, group_size, columns
):
    spec, weight, tensors = layer(70, columns, group_size, symmetric, bits=bits)
    again = NATIVE.unpack(tensors, spec)
    assert torch.equal(again.packed, weight.packed)
    assert torch.equal(again.scales, weight.scales)
    assert torch.equal(again.zero_points, weight.zero_points)
    assert again.group_size == group_size


@every_width
@both_grids
def test_integers_give_the_same_bits_with_every_instruction_set(bits, symmetric):
    spec, _, tensors = layer(150, 700, 64, symmetric, "int8", bits)
    x, results = torch.randn(31, 700), []
    for instructions in SETS:
        native._native.use(instructions)
        results.append(NATIVE.matmul(x, tensors, spec))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("book", CODE_BOOKS)
@both_activations
def test_levels_of_a_code_book_are_looked_up_wherever_integers_are_read(
    book, activation, monkeypatch
):
    spec, weight, tensors = layer(150, 700, 64, True, activation, 4, book)
    assert tensors[0].nbytes == NATIVE.pack(layer(150, 700, 64)[1], spec)[0].nbytes
    again, places = NATIVE.unpack(tensors, spec), torch.tensor([149, 0, 64])
    assert torch.equal(again.packed, weight.packed)
    expected = weight.dequantize()
    for values in (again.dequantize(), NATIVE.dequantize(tensors, spec)):
        assert torch.equal(values, expected)
    assert torch.equal(NATIVE.rows(tensors, spec, places).values(), expected[places])
    x, results = torch.randn(31, 700, requires_grad=True), []
    for instructions in SETS:
        native._native.use(instructions)
        results.append(NATIVE.matmul(x, tensors, spec))
    if activation == "int8":
        assert all(torch.equal(results[0], other) for other in results[1:])
    for result in results:
        (gradient,) = torch.autograd.grad(result.sum(), x)
        torch.testing.assert_close(gradient, expected.sum(0).expand(31, 700))
    arguments = (x, tensors[0], None, 700, 150, 4, True, activation == "int8", number_of(book))
    if SETS:
        torch.library.opcheck(LINEAR_INTN, arguments)
    monkeypatch.setattr(native, "NOT_BUILT", "it was not built")
    slow = REFERENCE.matmul(x, REFERENCE.pack(weight, spec), spec)
    assert torch.equal(LINEAR_INTN(*arguments), slow)


@pytest.mark.parametrize("instructions", SETS[:1])
@pytest.mark.parametrize(
    ("bits", "symmetric", "number"), [(4, True, 9), (8, True, 1), (4, False, 1)]
)
def test_code_books_that_do_not_exist_are_refused(instructions, bits, symmetric, number):
    _, _, tensors = layer(48, 96, 32, symmetric, bits=bits)
    with pytest.raises(OptionError, match="linear_intn"):
        LINEAR_INTN(torch.randn(2, 96), tensors[0], None, 96, 48, bits, symmetric, False, number)


@pytest.mark.parametrize("instructions", SETS[:1])
def test_it_comes_first_for_both_kinds_of_activations(instructions):
    for activation in ("float", "int8"):
        spec = LinearSpec(64, 96, 64, True, activation)
        assert choose_backend(spec, CPU)[0].name == "native"


def test_a_cpu_without_vector_instructions_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(native, "FAULT", None)
    monkeypatch.setattr(native, "IS_VECTORIZED", False)
    assert "nothing for this CPU" in NATIVE.unsupported(LinearSpec(8, 8, 8, True), CPU)
    assert NATIVE.unsupported(LinearSpec(8, 8, 8, True, "int8"), CPU) is None


def test_it_says_what_it_does_not_serve():
    assert "not on cuda" in NATIVE.unsupported(LinearSpec(8, 8, 8, True), torch.device("cuda"))
    assert "group_size is 20" in NATIVE.unsupported(LinearSpec(8, 40, 20, True), CPU)
    assert "group_size is 300" in NATIVE.unsupported(LinearSpec(8, 512, 300, True), CPU)
    assert "multiple of 32" in NATIVE.unsupported(LinearSpec(8, 80, 40, True, bits=3), CPU)


def test_an_extension_that_is_missing_or_wrong_is_not_used(monkeypatch):
    monkeypatch.setattr(native, "NOT_BUILT", "it was not built when fxquant was installed (x)")
    assert native.self_test() == "it was not built when fxquant was installed (x)"
    monkeypatch.setattr(native, "FAULT", native.self_test())
    spec = LinearSpec(64, 96, 64, True)
    backend, reasons = choose_backend(spec, CPU)
    assert backend.name == "aten"
    assert "not built" in reasons["native"]


@pytest.mark.parametrize("instructions", SETS[:1])
def test_wrong_results_are_found_when_fxquant_is_imported(instructions, monkeypatch):
    assert native.self_test() is None
    monkeypatch.setattr(native._native, "linear", lambda *arguments: True)
    assert "wrong results" in native.self_test()
