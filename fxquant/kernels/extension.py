"""The optional C++ extension, and why it may be missing.

Without a compiler it is not built when fxquant is installed; what it does is then done by torch.
"""

from typing import Any

import torch  # before the extension, which shares its OpenMP

try:
    from fxquant.kernels import _native
except ImportError as error:
    NOT_BUILT: str | None = f"it was not built when fxquant was installed ({error})"
    _native: Any = None  # type: ignore[no-redef]
else:
    NOT_BUILT = None

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/linear.h

__all__ = ["FLOAT_TYPES", "NOT_BUILT", "_native"]
