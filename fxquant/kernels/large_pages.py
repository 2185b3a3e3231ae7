"""Memory for packed weights in pages of 2 MB, where Linux has them.

A product of one row reads each byte of a weight once, so that it takes as long as reading does. In
pages of 4 KB the CPU looks up where a page lies half a thousand times more often, which can cost a
third of that time. torch's own memory has small pages, unless the process asks for others when it
starts.
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from fxquant.kernels.eager import is_plain

PAGE = 1 << 21  # bytes
_HAS_PAGES = hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MAP_PRIVATE")


def empty_bytes(shape: Sequence[int]) -> Tensor:
    """A uint8 tensor on the CPU without values, in large pages if it fills one."""
    count = math.prod(shape)
    if count < PAGE or not _HAS_PAGES:
        return torch.empty(shape, dtype=torch.uint8, device="cpu")
    # What is never written takes no memory: what lies before the first page. The rest of a last
    # page that is not full would, so that the end lies in small ones.
    memory = mmap.mmap(-1, count + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % PAGE
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE, first, count // PAGE * PAGE)
    return torch.frombuffer(memory, dtype=torch.uint8, offset=first, count=count).view(*shape)


def cloned(tensor: Tensor) -> Tensor:
    """`tensor.clone()`; plain bytes lie in large pages if they fill one."""
    if tensor.dtype is not torch.uint8 or not is_plain(tensor) or not tensor.is_contiguous():
        return tensor.clone()
    return empty_bytes(tensor.shape).copy_(tensor)
