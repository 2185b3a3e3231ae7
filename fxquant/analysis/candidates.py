"""The layers that can be quantized, in every width, each on its own."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.layers import Site, replaced, sites
from fxquant.modules.weight_forms import form_of


@dataclass(frozen=True)
class Candidate:
    """One layer of a graph.

    Attributes:
        name: the user's name.
        layer: the float layer.
        sites: the nodes that call it; several where it is shared.
        roots: the nodes of the outermost graph that it runs in: itself, or an opaque module.
    """

    name: str
    layer: nn.Module
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
        with replaced(self.layer, module):
            yield


def find_candidates(gm: GraphModule, names: Sequence[str]) -> list[Candidate]:
    """The named layers of `gm`, in the order of the graph.

    A layer inside an opaque module belongs to the node of the outermost graph that calls it.
    """
    by_name: dict[str, list[Site]] = {}
    for site in sites(gm):
        if form_of(site.module) is not None and site.name in names:
            by_name.setdefault(site.name, []).append(site)
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    found = []
    for name, places in by_name.items():
        roots = tuple(dict.fromkeys(site.node for site in places))
        found.append(Candidate(name, places[0].module, tuple(places), roots))
    return sorted(found, key=lambda c: min(position[n] for n in c.roots))
