"""The layers that can be quantized, in every width, each on its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.layers import Site, is_plain_linear, replaced, sites


@dataclass(frozen=True)
class Candidate:
    """One Linear layer of a graph.

    Attributes:
        name: the user's name.
        linear: the float layer.
        sites: the nodes that call it; several where it is shared.
        roots: the nodes of the outermost graph that it runs in: itself, or an opaque module.
    """

    name: str
    linear: nn.Linear
    sites: tuple[Site, ...]
    roots: tuple[Node, ...]

    @property
    def shares(self) -> str:
        """What names the value it reads: layers that share an input have the same."""
        site = self.sites[0]
        return site.target if site.input is None else site.input.name

    @contextmanager
    def replaced_by(self, module: nn.Module) -> Iterator[None]:
        """Let `module` do the layer's work for a while."""
        with replaced(self.linear, module):
            yield


def find_candidates(gm: GraphModule, names: Sequence[str]) -> list[Candidate]:
    """The named Linear layers of `gm`, in the order of the graph.

    A layer inside an opaque module belongs to the node of the outermost graph that calls it.
    """
    by_name: dict[str, list[Site]] = {}
    for site in sites(gm):
        if is_plain_linear(site.module) and site.name in names:
            by_name.setdefault(site.name, []).append(site)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found = []
    for name, places in by_name.items():
        linear = places[0].module
        assert isinstance(linear, nn.Linear)  # plain ones are
        roots = tuple(dict.fromkeys(site.node for site in places))
        found.append(Candidate(name, linear, tuple(places), roots))
    return sorted(found, key=lambda c: min(position[n] for n in c.roots))
