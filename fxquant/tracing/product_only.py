"""Whether a module of any class computes a linear layer and nothing else."""

import inspect

from torch import nn
from torch.fx import GraphModule, Node

from fxquant.graph.layers import is_plain_linear
from fxquant.graph.ops import op_of
from fxquant.tracing.assemble import assemble
from fxquant.tracing.canonical import canonicalize
from fxquant.tracing.prepare import prepared_alone
from fxquant.tracing.symbolic import capture_symbolic


def is_product_only(module: nn.Module) -> bool:
    """Whether `module` may be replaced by a linear layer with the same weight.

    Its code is traced: there must be one input, one product with a parameter, and else only changes
    of shape that keep the order of elements, or of dtype. Hooks count as code, unless the class is
    torch's own Linear: then they run before and after what takes its place.
    """
    if is_plain_linear(module):
        return True
    if "forward" in vars(module) or type(module).__call__ is not nn.Module.__call__:
        return False
    parameters = list(inspect.signature(module.forward).parameters.values())
    if len(parameters) != 1 or parameters[0].kind is not parameters[0].POSITIONAL_OR_KEYWORD:
        return False
    prepared = prepared_alone(module)
    capture = capture_symbolic(prepared, None)
    if isinstance(capture, str) or capture.opaque:
        return False
    return _is_one_product(canonicalize(assemble(capture, prepared), prepared))


def _is_one_product(gm: GraphModule) -> bool:
    nodes = list(gm.graph.nodes)
    calls = [n for n in nodes if n.op == "call_module"]
    if len(calls) != 1 or not is_plain_linear(gm.get_submodule(str(calls[0].target))):
        return False
    inputs = [n for n in nodes if n.op == "placeholder"]
    result = nodes[-1].args[0]
    return (
        len(inputs) == 1
        and not any(n.op == "get_attr" for n in nodes)
        and _comes_from(calls[0].args[0], inputs[0])
        and _comes_from(result, calls[0])
    )


def _comes_from(value: object, source: Node) -> bool:
    """Whether `value` is `source` with at most another shape or dtype."""
    while isinstance(value, Node) and value is not source:
        row = op_of(value)
        if not (row.keeps or row.cast) or row.random or not value.args:
            return False
        value = value.args[0]
    return value is source
