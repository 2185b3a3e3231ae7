"""Graph-level post-training quantization on torch.fx.

`__init__.pyi` lists the public names and where they live: type checkers read it, and at run time
each name is loaded when it is first used, so `import fxquant` alone does not import torch.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
