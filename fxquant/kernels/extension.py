"""The optional C++ extension, and why it may be missing.

Without a compiler it is not built when fxquant is installed; what it does is then done by torch.
"""

import torch  # first: the extension shares its OpenMP

try:
    from fxquant.kernels import _native
except ImportError as error:
    NOT_BUILT: str | None = f"it was not built when fxquant was installed ({error})"
else:
    NOT_BUILT = None

FLOAT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as in csrc/linear.h

__all__ = ["FLOAT_TYPES", "NOT_BUILT", "_native"]
