"""Whether a tensor is just a tensor, so that a kernel may be called without torch's dispatcher.

The dispatcher lets tracers, transforms and subclasses take part, and costs 2 microseconds: more
than the whole product of a small layer. Where none of them is at work, that is saved.
"""

from torch import Tensor
from torch.compiler import is_compiling

try:  # none has a public name as quick as this
    from torch._C import _is_tracing as is_tracing
    from torch._C._functorch import maybe_current_level as transform_level
    from torch.utils._python_dispatch import is_in_torch_dispatch_mode
except ImportError:
    KNOWS_TRANSFORMS = False
else:
    KNOWS_TRANSFORMS = True


def is_plain(x: Tensor) -> bool:
    """Whether `x` is a CPU tensor that nothing but eager execution sees."""
    return (
        KNOWS_TRANSFORMS
        and type(x) is Tensor
        and x.is_cpu
        and not is_compiling()
        and not x.is_neg()  # a view whose memory holds -x
        and not is_tracing()
        and not is_in_torch_dispatch_mode()
        and transform_level() is None
    )
