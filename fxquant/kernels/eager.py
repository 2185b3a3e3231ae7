"""Whether a kernel may be called directly, without torch's dispatcher.

Tracers, function transforms and tensor subclasses see an op because the dispatcher calls them. It
costs 2 microseconds, more than the whole product of a small layer. For a plain tensor, while none
of them is active, the kernel is called directly.
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
    """Whether `x` is a plain CPU tensor: no subclass, not traced, compiled or transformed."""
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
