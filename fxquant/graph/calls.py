"""`Call`: the arguments of one call of a model, from the calibration data to the steppers.

Everything that runs a model or a graph takes a `Call`; nothing else knows that arguments are a
tuple and a dict. A model may write into its arguments, so whoever runs a call gives the model a
clone of it and keeps the call as it was.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxquant.errors import FxquantError

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
        padding: booleans [rows, tokens], False where a token is padding, for a part of a model
            whose arguments do not tell it; None: they do, or there is none.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    padding: Tensor | None = None

    @classmethod
    def of(cls, item: object) -> "Call":
        """A tensor is one argument, a tuple or list are positional, a mapping has keywords."""
        if isinstance(item, Call):
            return item
        if isinstance(item, Mapping):
            return cls((), dict(item))
        if isinstance(item, tuple | list):
            return cls(tuple(item))
        return cls((item,))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """The call with every tensor of the arguments changed, also those inside containers."""

        def change_leaf(leaf: Any) -> Any:
            return change(leaf) if isinstance(leaf, Tensor) else leaf

        return Call(
            tuple(pytree.tree_map(change_leaf, self.args)),
            dict(pytree.tree_map(change_leaf, self.kwargs)),
            self.padding,
        )

    def clone(self) -> "Call":
        """The call on tensors of its own, outside of inference mode and of any graph of gradients.

        A tensor that is passed twice stays one tensor.
        """
        made: dict[int, Tensor] = {}

        def own(tensor: Tensor) -> Tensor:
            if id(tensor) not in made:
                with torch.inference_mode(False), torch.no_grad():
                    made[id(tensor)] = tensor.detach().clone()
            return made[id(tensor)]

        return self.map(own)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def row_count(self) -> int:
        """The size of the first dimension of the first tensor; a scalar counts as one."""
        first = next(iter(self.tensors()), None)
        return first.shape[0] if first is not None and first.ndim else 1

    def rows(self, start: int, stop: int) -> "Call":
        """The rows from `start` to `stop` of each tensor that has as many as the batch.

        Where the batch is as long as a sequence, nobody can tell the rows of a mask [T, T] beside
        the first tensor from those of the batch: then the call is returned whole.
        """
        count = self.row_count
        if (start, stop) == (0, count) or self._is_ambiguous(count):
            return self
        made = self.map(lambda t: t[start:stop] if t.ndim and t.shape[0] == count else t)
        padding = None if self.padding is None else self.padding[start:stop]
        return replace(made, padding=padding)

    def _is_ambiguous(self, count: int) -> bool:
        others = self.tensors()[1:]
        return count > 1 and any(list(t.shape).count(count) > 1 for t in others)

    def bind(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The value of each named parameter; defaults fill the rest.

        Args:
            parameters: the names in order, with their defaults (`inspect.Parameter.empty`: none).
        """
        values = {n: v for n, v in parameters.items() if v is not inspect.Parameter.empty}
        return values | dict(zip(parameters, self.args, strict=False)) | self.kwargs

    def run(self, module: nn.Module) -> Any:
        """What `module` returns for a clone of these arguments, without gradients."""
        own = self.clone()
        with torch.no_grad():
            return module(*own.args, **own.kwargs)

    def describe(self) -> str:
        """The shapes of the tensors by argument, for messages."""
        named = [*enumerate(self.args), *self.kwargs.items()]
        return ", ".join(f"{name}: {_shapes(value)}" for name, value in named)

    def check_dense(self, where: str, error: type[FxquantError]) -> None:
        """Raise `error`, which begins with `where`, if a tensor is sparse, nested or on meta.

        Rows of such a tensor cannot be cut, nor can its values be looked at.
        """
        for path, leaf in self.leaves():
            if not isinstance(leaf, Tensor):
                continue
            kind = "a nested tensor" if leaf.is_nested else f"a tensor of {leaf.layout}"
            if leaf.is_meta or leaf.is_nested or leaf.layout is not torch.strided:
                raise error(
                    f"{where}, argument {path}",
                    found="a tensor on the meta device" if leaf.is_meta else kind,
                    needed="a dense tensor with values",
                    remedy="Make it dense (to_dense, or padding), or quantize without inputs.",
                )

    def leaves(self) -> Iterator[tuple[str, Any]]:
        """Every value with where it is among the arguments."""
        for path, leaf in pytree.tree_leaves_with_path((self.args, self.kwargs)):
            yield pytree.keystr(path[1:]), leaf


def _shapes(value: object) -> object:
    if isinstance(value, Tensor):
        return list(value.shape)
    if isinstance(value, tuple | list):
        return f"({', '.join(str(_shapes(v)) for v in value)})"
    return type(value).__name__
