"""A forward that seeds the random numbers before it draws, as hashing attention does.

An export records what is computed with tensors, so the call would be lost and other numbers drawn.
Here it is an op of the export, and a node of the graph: `seed_random(number)`. Where all that is
drawn after it has sizes that are known, the draws are the same in each call: constants of the
graph, which then seeds nothing.

before: `manual_seed(3); r = randn([64, 4])`; after: `r = self._seeded_0`
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from fxquant.graph.effects import is_random
from fxquant.graph.structures import seed_random
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


def fold_seeded_draws(graph: Graph, constants: dict[str, Tensor]) -> None:
    """Draw once what a graph would draw anew from the same seed in each call.

    Args:
        graph: is changed.
        constants: get what was drawn, by name.
    """
    for node in [n for n in graph.nodes if n.target is seed_random]:
        draws = _draws_after(node)
        if any(draw.all_input_nodes for draw in draws):
            continue  # of a size, or with values, that change from call to call
        seed: Any = node.args[0]
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            values = [_drawn(draw) for draw in draws]
        for draw, value in zip(draws, values, strict=True):
            name = f"_seeded_{len(constants)}"
            constants[name] = value
            with graph.inserting_before(draw):
                draw.replace_all_uses_with(graph.get_attr(name))
            graph.erase_node(draw)
        graph.erase_node(node)


def _drawn(draw: Node) -> Tensor:
    function: Any = draw.target
    value: Tensor = function(*draw.args, **draw.kwargs)
    return value


def _draws_after(seed: Node) -> list[Node]:
    """The nodes that draw random numbers after a seed, up to the next one."""
    draws, node = [], seed.next
    while node.op != "output" and node.target is not seed_random:
        if node.op == "call_function" and is_random(node):
            draws.append(node)
        node = node.next
    return draws
