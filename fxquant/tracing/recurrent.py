"""Recurrent modules, which an exported program writes as functions of all their weights.

before: `y, h, c = lstm.input(x, [h0, c0], [w_ih, w_hh, b_ih, b_hh], True, 1, ...)`
after:  `y, (h, c) = self.lstm(x, (h0, c0))`, which can be quantized and be in a file
"""

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.layers import has_hooks, tensor_attribute
from fxquant.graph.shapes import MODULE_PATH

aten = torch.ops.aten
_CLASSES: dict[Any, type[nn.RNNBase]] = {aten.lstm.input: nn.LSTM, aten.gru.input: nn.GRU}


def recurrent_owner(gm: GraphModule, module: nn.Module, node: Node) -> str | None:
    """The path of the module that makes this call with its own weights, or None.

    Args:
        gm: the graph.
        module: the model that was traced.
        node: any node.
    """
    kind, path = _CLASSES.get(node.target), node.meta.get(MODULE_PATH)
    if kind is None or not path or node.kwargs or len(node.args) != 9:
        return None
    owner: Any = module.get_submodule(path)
    if type(owner) is not kind or has_hooks(owner) or "forward" in vars(owner):
        return None
    own, given = owner._flat_weights, node.args[2]
    if not isinstance(given, list | tuple) or len(own) != len(given):
        return None
    is_own = all(_has_weight(gm, n, weight) for n, weight in zip(given, own, strict=True))
    return path if is_own and node.args[8] == owner.batch_first else None


def _has_weight(gm: GraphModule, node: Any, weight: Any) -> bool:
    if not isinstance(node, Node) or node.op != "get_attr":
        return False
    found: Any = tensor_attribute(gm, node)
    return found is weight or found.data_ptr() == weight.data_ptr()


def restore_recurrent(gm: GraphModule, node: Node, target: str) -> None:
    """Put a call of the module `target` in the place of the function."""
    source: Any = node.args[0]
    states: Any = node.args[1]
    is_lstm = node.target is aten.lstm.input
    with gm.graph.inserting_before(node):
        made = gm.graph.call_module(target, (source, tuple(states) if is_lstm else states))
    made.meta = dict(node.meta)
    for user in list(node.users):
        number: Any = user.args[1]
        if is_lstm and number > 0:  # (y, h, c) is (y, (h, c)) now
            with gm.graph.inserting_before(user):
                pair = gm.graph.call_function(operator.getitem, (made, 1))
            user.args = (pair, number - 1)
        else:
            user.args = (made, number)
    gm.graph.erase_node(node)
