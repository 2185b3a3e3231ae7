"""How fast this machine is at what runs spend their time on, with torch's number of threads.

Each figure is the fastest of a few goes by the clock of the calling thread, which takes part in all
work and does not count the time in which other processes have its core.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from fxquant.config.method import Recipe
from fxquant.config.quant_config import QuantConfig
from fxquant.exporters.verify import read_words
from fxquant.exporters.words import pack_rows
from fxquant.graph.left_alone import process_left_alone
from fxquant.modules.linear import QuantizedLinear
from fxquant.observers.moments import LayerMoments
from fxquant.passes.fitted_layers import FittedLayers
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.planning.work import LayerWork

MOST_WIDTH = 1024  # rows and inputs of a layer that is tried; larger ones are extrapolated
TOKENS = 256  # rows of the product that is timed
GOES = 3


@dataclass
class Speed:
    """The machine on layers of a config.

    Args:
        config: how layers are quantized.
        recipe: of its method.
    """

    config: QuantConfig
    recipe: Recipe
    _solved: dict[tuple[int, int], float] = field(default_factory=dict)
    _rounded: dict[tuple[int, int], float] = field(default_factory=dict)
    _packed: dict[tuple[int, int], float] = field(default_factory=dict)
    _rates: dict[tuple[int, int, torch.dtype, bool], float] = field(default_factory=dict)

    def flops(self, layer: LayerWork) -> float:
        """Floating-point operations a second of its product, in its own dtype."""
        return self._flops(layer, layer.dtype, is_quantized=False)

    def quantized_flops(self, layer: LayerWork) -> float:
        """The same of the quantized layer."""
        return self._flops(layer, layer.dtype, is_quantized=True)

    def moment_flops(self, layer: LayerWork) -> float:
        """The same of products of its inputs, which are float32."""
        return self._flops(layer, torch.float32, is_quantized=False)

    def _flops(self, layer: LayerWork, dtype: torch.dtype, *, is_quantized: bool) -> float:
        rows, inputs = _tried(layer)
        key = rows, inputs, dtype, is_quantized
        if key not in self._rates:
            with process_left_alone(), torch.no_grad():
                product: nn.Module = _linear(rows, inputs, dtype)
                if is_quantized:
                    product = RoundedLayers(self.config).quantize("layer", product, layer.bits)
                x = torch.randn(TOKENS, inputs, dtype=dtype)
                self._rates[key] = 2 * TOKENS * rows * inputs / _fastest(lambda: product(x))
        return self._rates[key]

    def solving(self, layer: LayerWork) -> float:
        """Seconds to fit a layer to its moments, all blocks of it.

        That of a wider layer is extrapolated by inputs² · (inputs + rows).
        """
        rows, inputs = _tried(layer)
        if (rows, inputs) not in self._solved:
            self._solved[rows, inputs] = self._solve(rows, inputs, layer.bits)
        ratio = _solver_work(layer.rows, layer.inputs) / _solver_work(rows, inputs)
        return self._solved[rows, inputs] * ratio * layer.blocks

    def rounding_of(self, layer: LayerWork) -> float:
        """Seconds to round a layer, in proportion to its elements."""
        rows, inputs = _tried(layer)
        if (rows, inputs) not in self._rounded:
            with process_left_alone(), torch.no_grad():
                linear = _linear(rows, inputs)
                rounding = "rtn" if self.recipe.rounding == "gptq" else self.recipe.rounding

                def round_once() -> object:
                    made = RoundedLayers(self.config, rounding)
                    return made.quantize("layer", linear, layer.bits)

                self._rounded[rows, inputs] = _fastest(round_once)
        return self._rounded[rows, inputs] * layer.elements / (rows * inputs)

    def packing_of(self, layer: LayerWork) -> float:
        """Seconds to pack a layer for a file and to read it back, in proportion to its elements."""
        rows, inputs = _tried(layer)
        if (rows, inputs) not in self._packed:
            with process_left_alone(), torch.no_grad():
                made = RoundedLayers(self.config).quantize("layer", _linear(rows, inputs), 4)
                assert isinstance(made, QuantizedLinear)  # it was made of one

                def round_trip() -> object:
                    integers = made.quantized_weight
                    words = pack_rows(integers.integers(), 4)
                    return read_words(words, 4), made.dequantize()

                self._packed[rows, inputs] = _fastest(round_trip)
        return self._packed[rows, inputs] * layer.elements / (rows * inputs)

    def _solve(self, rows: int, inputs: int, bits: int) -> float:
        with process_left_alone(), torch.no_grad():
            linear, x = _linear(rows, inputs), torch.randn(TOKENS, inputs)
            moments = LayerMoments(inputs, rows)
            moments.add(x)
            moments.hold_out(x)
            fitter, blocks = FittedLayers(self.config, refined=self.recipe.refined), Blocks(linear)
            return _fastest(lambda: fitter.fit("layer", blocks, 0, bits, moments), goes=1)


def _tried(layer: LayerWork) -> tuple[int, int]:
    """Rows and inputs of the layer that stands for one."""
    return min(layer.rows, MOST_WIDTH), min(layer.inputs, MOST_WIDTH)


def _linear(rows: int, inputs: int, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)  # the caller's random state is put back
    linear = nn.Linear(inputs, rows, bias=False, dtype=dtype)
    return linear.requires_grad_(requires_grad=False)


def _solver_work(rows: int, inputs: int) -> int:
    return inputs**2 * (inputs + rows)


def _fastest(work: Callable[[], object], goes: int = GOES) -> float:
    seconds = []
    for _ in range(goes):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return max(min(seconds), 1e-9)
