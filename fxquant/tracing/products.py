"""Which parameters are factors of a product: what a quantizer can be asked about.

Three looks at one question. Where there is an example, the run of the user's own model shows which
parameters its products used; without one, the classes of modules and the ops of the graph tell.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxquant.graph.ops import OPS, target_name


class ProductSpy(TorchFunctionMode):
    """Notes which parameters of a model go into products while it runs.

    Attributes:
        seen: the kind of product by the name of the parameter.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seen: dict[str, str] = {}
        self._names: dict[int, str] = {id(p): n for n, p in model.named_parameters()}
        self._kept: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        row = OPS.get(target_name(func))
        if row is None:
            return result
        if row.product is not None:
            for value in (*args, *kwargs.values()):
                self._note(value, row.product)
        elif (row.view or row.cast or row.moves or row.keeps) and args:
            name = self._names.get(id(args[0]))
            if name is not None:
                self._derive(result, name)
        return result

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        for tensor in self._kept:
            self._names.pop(id(tensor), None)
        self._kept.clear()

    def _note(self, value: Any, kind: str) -> None:
        if isinstance(value, Mapping | list | tuple):
            for part in value.values() if isinstance(value, Mapping) else value:
                self._note(part, kind)
        elif isinstance(value, Tensor) and value.ndim >= 2:
            name = self._names.get(id(value))
            if name is not None:
                is_expert = kind == "linear" and value.ndim == 3
                self.seen.setdefault(name, "expert" if is_expert else kind)

    def _derive(self, result: Any, name: str) -> None:
        for tensor in result if isinstance(result, list | tuple) else (result,):
            if isinstance(tensor, Tensor) and id(tensor) not in self._names:
                self._names[id(tensor)] = name
                self._kept.append(tensor)


def is_matrix(tensor: Any) -> bool:
    """Whether a tensor could be a weight of a product at all."""
    return isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.is_floating_point()
