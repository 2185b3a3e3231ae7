"""Run a graph node by node, as its generated code would."""

from typing import Any

from torch.fx import Interpreter, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list


class GraphInterpreter(Interpreter):
    """torch's interpreter, but functions get lists and dicts that they may write into."""

    def fetch_args_kwargs_from_env(self, n: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a node, by the values of the nodes that it reads."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(writable, args)), {key: writable(v) for key, v in kwargs.items()}


def writable(value: Any) -> Any:
    """`value` with a node's immutable lists and dicts replaced by new plain ones."""
    if type(value) is immutable_list:
        return [writable(part) for part in value]
    if type(value) in (dict, immutable_dict):
        return {key: writable(part) for key, part in value.items()}
    if type(value) is tuple:
        return tuple(map(writable, value))
    return value
