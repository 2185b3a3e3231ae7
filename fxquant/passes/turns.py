"""In which order layers are quantized one after the other, and which of them together.

A turn is a place in the graph where layers have their inputs but have not run. Layers that read
the same value have one turn, at the first of them: what is collected of the value serves all.
"""

from collections import defaultdict
from dataclasses import dataclass

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.effects import writes_before
from fxquant.graph.layers import Site, sites
from fxquant.graph.residual import added_to
from fxquant.modules.weight_forms import form_of


@dataclass(frozen=True)
class Turn:
    """Layers whose inputs are known at one place.

    Attributes:
        position: of the first of them among the graph's nodes; nodes before it have run.
        sites: where they run for the first time: of one value that they read, or all of those
            inside one opaque module.
        residuals: what each one's output is added to, if anything.
    """

    position: int
    sites: list[Site]
    residuals: dict[str, Node]

    @property
    def node(self) -> Node:
        """The first node that runs one of the layers."""
        return self.sites[0].node

    @property
    def is_inside(self) -> bool:
        """Whether they run inside an opaque module."""
        return self.sites[0].is_inside


def find_turns(gm: GraphModule, names: set[str]) -> list[Turn]:
    """The turns of the layers called `names`, in the order of the graph.

    Args:
        gm: a traced model.
        names: of layers that have a form; those of another kind than linear have their own turns.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    written, repeated = writes_before(gm), repeated_layers(gm, names)
    turns: list[Turn] = []
    by_place: dict[tuple[object, ...], Turn] = {}
    seen: set[nn.Module] = set()
    for site in sites(gm):
        form = form_of(site.module)
        if site.module in seen or site.name not in names or form is None:
            continue
        seen.add(site.module)
        residual = None if site.is_inside else added_to(gm, site.node)
        place: tuple[object, ...] = (site.node,)
        is_first = site.input is not None and site.module not in repeated
        if form.shares_input and is_first and not site.is_inside:
            place = (site.input, written[site.node])
        turn = by_place.get(place)
        is_known = turn is not None and (residual is None or position[residual] < turn.position)
        if turn is None or not is_known:
            turn = Turn(position[site.node], [], {})
            turns.append(turn)
            by_place.setdefault(place, turn)
        turn.sites.append(site)
        if residual is not None:
            turn.residuals[site.name] = residual
    return turns


def repeated_layers(gm: GraphModule, names: set[str]) -> dict[nn.Module, str]:
    """The layers that several nodes call, with their names."""
    calls: dict[nn.Module, list[str]] = defaultdict(list)
    for site in sites(gm):
        form = form_of(site.module)
        if form is not None and not form.is_lookup and site.name in names:
            calls[site.module].append(site.name)
    return {layer: found[0] for layer, found in calls.items() if len(found) > 1}
