"""Graph-level post-training quantization on torch.fx.

`__init__.pyi` lists the public names and where they live: type checkers read it, and at run time
each name is loaded when it is first used, so `import fxquant` alone does not import torch.
"""

import warnings
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    """Load a public name; what is imported for it leaves the filters of warnings as they are."""
    with warnings.catch_warnings():
        return _load(name)
