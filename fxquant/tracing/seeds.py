"""A forward that seeds the random numbers before it draws, as hashing attention does.

An export records what is computed with tensors, so the call would be lost and other numbers drawn.
Here it is an op of the export, and a node of the graph: `seed_random(number)`.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fxquant.tracing.branches import is_tool

_library = torch.library.Library("fxquant_tracing", "FRAGMENT")
_library.define("seed(int number) -> ()")
RESEED = torch.ops.fxquant_tracing.seed.default
torch.fx.node.has_side_effect(RESEED)


def _seed(number: int) -> None:
    """What an export sees of the op: it computes nothing."""


torch.library.register_fake("fxquant_tracing::seed", _seed)
_library.impl("seed", _seed, "BackendSelect")


@contextmanager
def recorded_seeds() -> Iterator[None]:
    """Calls of `torch.manual_seed` by the user's code inside are recorded, and made."""
    kept = torch.manual_seed

    def seed(number: Any) -> Any:
        if type(number) is int and not is_tool(sys._getframe(1)):
            RESEED(number)
        return kept(number)

    torch.manual_seed = torch.random.manual_seed = seed  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.manual_seed = torch.random.manual_seed = kept
