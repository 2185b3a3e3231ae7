"""Where a mixture of experts chooses experts, and the layers whose outputs it chooses by."""

from collections.abc import Callable, Iterator

from torch.fx import GraphModule, Node

from fxquant.graph.layers import sites
from fxquant.graph.ops import op_name
from fxquant.modules.grouped_linear import GroupedLinear, QuantizedGroupedLinear

_CHOICES = ("topk", "argmax")


def choices_of_experts(gm: GraphModule) -> dict[Node, str]:
    """The nodes that choose experts, with the name of the first layer that they choose for.

    They are those from which the numbers or offsets of a call of experts are computed, the nearest
    ones. Experts that all tokens are multiplied with have none.
    """
    found: dict[Node, str] = {}
    for site in sites(gm):
        is_routed = isinstance(site.module, GroupedLinear | QuantizedGroupedLinear)
        if is_routed and not site.is_inside:
            given = (*site.node.args[1:], *site.node.kwargs.values())
            nodes = [node for node in given if isinstance(node, Node)]
            for node in _nearest(nodes, lambda node: op_name(node) in _CHOICES):
                found.setdefault(node, site.name)
    return found


def routers(gm: GraphModule) -> set[str]:
    """The names of the layers whose outputs are the scores by which experts are chosen."""
    layers = {site.node: site.name for site in sites(gm) if not site.is_inside}
    choices = list(choices_of_experts(gm))
    scores = [source for choice in choices for source in choice.all_input_nodes]
    return {layers[node] for node in _nearest(scores, lambda node: node in layers)}


def _nearest(nodes: list[Node], is_wanted: Callable[[Node], bool]) -> Iterator[Node]:
    """The wanted ones of `nodes` and of what they are computed from, and none behind these."""
    seen: set[Node] = set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_wanted(node):
            yield node
        else:
            nodes.extend(node.all_input_nodes)
