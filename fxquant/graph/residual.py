"""Finds the residual connection that a layer's output is added to."""

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.effects import is_random
from fxquant.graph.ops import is_addition, op_of

KEEPING_MODULES = (nn.Dropout, nn.Identity)


def added_to(gm: GraphModule, node: Node) -> Node | None:
    """What the value of `node` is added to, as in a residual connection.

    before: `y = layer(x); z = residual + dropout(y)`, `node` being `y`
    after: `residual`

    Args:
        gm: the graph of `node`.
        node: a node in it.

    Returns:
        The other operand, whose elements are those of `node` in the same order; None where the
        value is used in another way, or twice.
    """
    value = node
    while len(value.users) == 1:
        user = next(iter(value.users))
        if _keeps(gm, user, value):
            value = user
            continue
        operands = [a for a in user.args if isinstance(a, Node)]
        if not is_addition(user) or len(operands) != 2 or operands[0] is operands[1]:
            return None
        return operands[1] if operands[0] is value else operands[0]
    return None


def _keeps(gm: GraphModule, user: Node, value: Node) -> bool:
    if not user.args or user.args[0] is not value:
        return False
    if user.op == "call_module":
        return isinstance(gm.get_submodule(str(user.target)), KEEPING_MODULES)
    return op_of(user).keeps and not is_random(user)
