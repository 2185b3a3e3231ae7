"""Which nodes multiply two values that both come from the data, such as attention's scores."""

from torch.fx import GraphModule, Node

from fxquant.graph.linear_operands import linear_operands
from fxquant.graph.ops import is_inquiry, op_of
from fxquant.graph.shapes import DTYPE

_ATTENTION = ("query", "key", "value")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
Axis = int | None  # along which the vectors of an operand lie that are multiplied; None: any


def activation_products(gm: GraphModule) -> dict[Node, dict[Node, Axis]]:
    """The products of a graph in which no factor is a weight.

    Args:
        gm: a graph.

    Returns:
        By the node of the product, its factors with the axis along which they are multiplied. What
        depends on the data by its size alone, as a table of frequencies does, is a weight. The
        factors of `scaled_dot_product_attention` are queries, keys and values, a vector a token;
        the probabilities inside are none. Integers are none either.
    """
    found: dict[Node, dict[Node, Axis]] = {}
    from_data: set[Node] = set()
    for node in gm.graph.nodes:
        is_computed = not is_inquiry(node) and not from_data.isdisjoint(node.all_input_nodes)
        if node.op == "placeholder" or is_computed:
            from_data.add(node)
        factors: dict[Node, Axis] = {}
        for factor, axis in _factors(node):
            if not isinstance(factor, Node) or factor not in from_data or not _is_float(factor):
                break
            factors[factor] = axis if factors.get(factor, axis) == axis else None
        else:
            if factors:
                found[node] = factors
    return found


def _factors(node: Node) -> list[tuple[object, Axis]]:
    """The factors of a node that is a product of two or three values, whatever these are."""
    if op_of(node).scale == "attention":
        given = {**dict(zip(_ATTENTION, node.args, strict=False)), **node.kwargs}
        return [(given.get(name), -1) for name in _ATTENTION]
    operands = linear_operands(node)
    if operands is None:
        return []
    if operands.equation is not None:
        return [(operands.input, None), (operands.weight, None)]
    return [(operands.input, -1), (operands.weight, -2 if operands.is_transposed else -1)]


def _is_float(node: Node) -> bool:
    return node.meta.get(DTYPE, _FLOATS[0]) in _FLOATS
