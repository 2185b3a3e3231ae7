"""Graphs in the place of modules that an opaque parent's code calls and looks at."""

from types import FunctionType, MethodType
from typing import Any

from torch import nn
from torch.fx import GraphModule

from fxquant.graph.scopes import WRAPPED

KEY = "fxquant_original"


class StandInGraph(GraphModule):
    """A graph in the place of an opaque parent's child.

    The parent's code may read the child's plain attributes, its weight, or call its methods: they
    are answered as the child would. What they need lies in `meta`, which copies of a graph keep.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            original, attributes = vars(self)["meta"].get(KEY, (object, {}))
            wrapped = self._modules.get(WRAPPED)
            method = getattr(original, name, None)
            if name in attributes:
                return attributes[name]
            if wrapped is not None and name in ("weight", "bias"):
                return getattr(wrapped, name)
            if isinstance(method, FunctionType):
                return MethodType(method, self)
            raise


def stand_in(gm: GraphModule, original: nn.Module) -> StandInGraph:
    """Let `gm` answer like `original`, the module it was traced from."""
    plain = {k: v for k, v in vars(original).items() if not k.startswith("_") and k != "training"}
    return make_stand_in(gm, type(original), plain)


def make_stand_in(gm: GraphModule, original: type, attributes: dict[str, Any]) -> StandInGraph:
    """Let `gm` answer like a module of class `original` with these plain attributes."""
    made = StandInGraph(gm, gm.graph, original.__name__)
    made.meta = {**gm.meta, KEY: (original, attributes)}
    return made.eval()
