"""Convolutions of integers and max pooling with channels last, against torch's."""

import pytest
import torch
import torch.nn.functional as F

from fxquant.kernels.convolution import Steps, convolve, pack_kernel
from fxquant.kernels.extension import NOT_BUILT, _native
from fxquant.kernels.functions import FUNCTIONS
from fxquant.kernels.pooling import max_pool

pytestmark = pytest.mark.skipif(NOT_BUILT is not None, reason="the extension is not built here")
SETS = _native.instruction_sets() if NOT_BUILT is None else []
# Channels, outputs, kernel, stride, dilation, padding before and after, size of the image.
CASES = {
    "few channels": (3, 40, (7, 7), (2, 2), (1, 1), (3, 3), (3, 3), (19, 17)),
    "a whole chunk": (64, 64, (3, 3), (1, 1), (1, 1), (1, 1), (1, 1), (7, 7)),
    "a point": (20, 33, (1, 1), (2, 2), (1, 1), (0, 0), (0, 0), (9, 8)),
    "sides of their own": (16, 7, (3, 2), (1, 3), (2, 1), (2, 0), (1, 1), (11, 12)),
    "dilated columns": (5, 65, (1, 3), (1, 1), (1, 3), (0, 2), (0, 2), (4, 9)),
    "padding beyond the kernel": (9, 3, (2, 2), (1, 1), (1, 1), (5, 4), (4, 5), (2, 3)),
}


@pytest.fixture(params=SETS)
def _instructions(request):
    _native.use(request.param)
    yield
    _native.use(SETS[0])


def drawn(channels, outputs, kernel, size, batch=3):
    torch.manual_seed(0)
    x = torch.randint(0, 256, (batch, channels, *size), dtype=torch.uint8)
    q = torch.randint(-128, 128, (outputs, channels, *kernel), dtype=torch.int8)
    return x, q, torch.rand(outputs) * 0.01 + 0.001


def of_torch(x, scale, zero_point, q, scales, steps, bias, residual, function):
    values = (x.double() - zero_point.view(-1, 1, 1, 1)) * scale.view(-1, 1, 1, 1)
    (top, left), (bottom, right) = steps.before, steps.after
    weight = q.double() * scales.double()[:, None, None, None]
    padded = F.pad(values, (left, right, top, bottom))
    y = F.conv2d(padded, weight, None, steps.stride, 0, steps.dilation)
    y = y if bias is None else y + bias.double()[:, None, None]
    return FUNCTIONS[function](y if residual is None else y + residual.double())


@pytest.mark.parametrize("grids", ["one", "each"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.usefixtures("_instructions")
def test_it_computes_what_torch_does(case, grids):
    channels, outputs, kernel, *sides, size = case
    x, q, scales = drawn(channels, outputs, kernel, size)
    steps = Steps(*sides)
    count = 1 if grids == "one" else len(x)
    scale, zero_point = torch.rand(count) + 0.1, torch.randint(0, 256, (count,)).float()
    shape = len(x), outputs, *steps.places(x.shape, kernel)
    bias, residual = torch.randn(outputs), torch.randn(shape)
    for given, function in ((residual, "relu"), (None, "silu"), (residual.bfloat16(), "none")):
        expected = of_torch(x, scale, zero_point, q, scales, steps, bias, given, function)
        to_grid = expected.abs().max().float() / 100, torch.tensor(90.0)
        y, rounded = convolve(
            x, scale, zero_point, pack_kernel(q, scales), steps, bias, given, function,
            torch.float32, to_grid,
        )  # fmt: skip
        assert torch.allclose(y.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
        levels = (expected / to_grid[0] + 90).clamp(0, 255)
        assert (rounded.double() - levels).abs().max() < 0.51
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_all_instruction_sets_give_the_same_bits(case):
    channels, outputs, kernel, *sides, size = case
    x, q, scales = drawn(channels, outputs, kernel, size)
    found = []
    for name in SETS:
        _native.use(name)
        around = None, None, "relu", torch.bfloat16, (torch.tensor(1.0), torch.tensor(3.0))
        kernel, grid = pack_kernel(q, scales), (torch.tensor(0.3), torch.tensor(7.0))
        found.append(convolve(x, *grid, kernel, Steps(*sides), *around))
    _native.use(SETS[0])
    assert all(torch.equal(a, b) for parts in found for a, b in zip(parts, found[0], strict=True))


def test_a_sample_has_the_same_bits_in_every_batch():
    x, q, scales = drawn(16, 40, (3, 3), (20, 20), batch=9)
    kernel, steps = pack_kernel(q, scales), Steps((1, 1), (1, 1), (1, 1), (1, 1))
    scale, zero_point = torch.tensor(0.3), torch.tensor(7.0)
    y, _ = convolve(x, scale, zero_point, kernel, steps)
    one, _ = convolve(x[5:6], scale, zero_point, kernel, steps)
    assert torch.equal(y[5:6], one)


def test_any_layout_of_the_input_gives_the_same_bits():
    x, q, scales = drawn(6, 10, (3, 3), (8, 8))
    kernel, steps = pack_kernel(q, scales), Steps((1, 1), (1, 1), (1, 1), (1, 1))
    scale, zero_point = torch.tensor(0.3), torch.tensor(7.0)
    y, none = convolve(x, scale, zero_point, kernel, steps)
    strided = torch.stack((x, x), -1).flatten(-2)[..., ::2]
    for given in (x.contiguous(memory_format=torch.channels_last), strided):
        assert torch.equal(convolve(given, scale, zero_point, kernel, steps)[0], y)
    assert none is None


def test_a_grid_of_nan_gives_nan_in_its_sample_alone():
    x, q, scales = drawn(6, 10, (3, 3), (8, 8))
    kernel, steps = pack_kernel(q, scales), Steps((1, 1), (1, 1), (1, 1), (1, 1))
    scale, zero_point = torch.tensor([0.3, torch.nan, 0.3]), torch.tensor([7, torch.nan, 7])
    y, _ = convolve(x, scale, zero_point, kernel, steps)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sides", [((3, 3), (2, 2), (1, 1), (1, 1)), ((2, 4), (1, 3), (1, 2), (2, 1))]
)
def test_pooling_is_that_of_torch(sides, dtype):
    x = torch.randn(2, 70, 9, 12).to(dtype)
    x[0, 3, 4, 5] = torch.nan
    x[1, :, :3, :3] = -torch.inf
    x = x.contiguous(memory_format=torch.channels_last)
    found, expected = max_pool(x, *sides), F.max_pool2d(x, *sides)
    assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "sides",
    [
        ((2, 2), (0, 1), (0, 0), (1, 1)),
        ((2, 2), (1, 1), (2, 0), (1, 1)),
        ((2, 2), (1, 1), (-1, 0), (1, 1)),
        ((0, 2), (1, 1), (0, 0), (1, 1)),
        ((2, 2), (1, 1), (0, 0), (1, 0)),
        ((9, 9), (1, 1), (0, 0), (1, 1)),
    ],
)
def test_sizes_of_a_pooling_that_do_not_fit_are_refused_by_torch(sides):
    x = torch.randn(1, 5, 4, 4).contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError):
        max_pool(x, *sides)
