"""Importing this registers every operator that an exported program may call.

`import fxquant` alone imports no torch, and so registers none.
"""

from fxquant.kernels.attention import ATTENTION
from fxquant.kernels.native import LINEAR_INTN

__all__ = ["ATTENTION", "LINEAR_INTN"]
