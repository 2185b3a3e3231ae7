"""Commands under `torchrun`: its processes share the work, and the first one of them speaks."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

# Between two exchanges of the processes. torchrun itself ends all where one has died.
TIMEOUT = timedelta(hours=12)


@contextmanager
def torchrun_group() -> Iterator[bool]:
    """The default group of `torch.distributed`, if torchrun has started this process.

    Yields:
        Whether this process is the first of its group, or alone.
    """
    is_launched = dist.is_available() and dist.is_torchelastic_launched()
    if not is_launched or dist.is_initialized():
        yield not is_launched or dist.get_rank() == 0
        return
    dist.init_process_group("gloo", timeout=TIMEOUT)
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()
