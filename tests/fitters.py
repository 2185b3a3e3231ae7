"""A fitter of layers that only keeps what it is told."""

from fxquant.modules.linear_int4 import QuantizedLinearInt4


class KeepingFitter:
    """Rounds linear layers, and keeps their moments in `seen`, by name."""

    def __init__(self):
        self.seen = {}

    def fit(self, name, blocks, index, bits, moments):
        assert index == 0
        self.seen[name] = moments

    def make(self, name, layer, bits, fitted):
        assert fitted == [None]
        return QuantizedLinearInt4.from_float(layer, 32)
