"""The tensors of a folder, read into the modules of a model on meta when they are needed.

The folder and the class of the model may have other names; see `stored_names`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.exporters.folder_reader import FolderReader, ShardReader
from fxquant.exporters.stored_names import WEIGHT, Rows, StoredParameter, stored_parameters


class ModelWeights:
    """Gives modules of a model their values, and takes them back.

    Args:
        base: the folder.
        model: of the folder's class; parameters on meta.

    Attributes:
        stored: what makes up each parameter and buffer, by its name in the model.
        parameter_of: the parameter or buffer that a tensor of the folder belongs to, by its name;
            tensors that the class has no use for are not there.
    """

    def __init__(self, base: FolderReader, model: nn.Module) -> None:
        self.base, self.model = base, model
        self._paths = {module: path for path, module in model.named_modules()}
        self._names: dict[int, list[str]] = defaultdict(list)  # a tied parameter has several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[id(parameter)].append(name)
        self.stored = stored_parameters(base.files, model)
        self._rows: dict[str, Rows | None] = {}  # what was asked for: a conversion takes time
        self.parameter_of = {
            tensor: name for name, stored in self.stored.items() for tensor in stored.tensors
        }

    def check(self) -> None:
        """Look for a tensor for each parameter; no data is read.

        Raises:
            OptionError: the folder has no such tensor, or one of another shape.
        """
        for parameter in self.model.parameters():
            self.check_shape(parameter)

    def read(self, name: str) -> Tensor:
        """A tensor of the folder; its file is not kept open, whose pages would count as memory."""
        return ShardReader(self.base.path / self.base.files[name]).tensor(name)

    @contextmanager
    def filled(
        self, module: nn.Module, read: Callable[[str], Tensor] | None = None
    ) -> Iterator[None]:
        """The module and all below it have their values inside.

        Args:
            module: of the model.
            read: gives the tensor of a name; by default, the folder's.

        Raises:
            OptionError: the folder has no such tensor, or one of another shape.
        """
        filling = _Filling(self, read or self.read)
        try:
            for part in module.modules():
                filling.fill(part)
            yield
        finally:
            filling.undo()

    @contextmanager
    def filled_when_called(
        self, without: Iterable[nn.Module], read: Callable[[str], Tensor] | None = None
    ) -> Iterator[None]:
        """Inside, each module gets its own values when it is called for the first time.

        Args:
            without: modules that stay on meta, with all that is below them.
            read: gives the tensor of a name; by default, the folder's.
        """
        left_out = {part for module in without for part in module.modules()}
        filling = _Filling(self, read or self.read)
        handles = [
            module.register_forward_pre_hook(lambda module, args: filling.fill(module))
            for module in self.model.modules()
            if module not in left_out
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            filling.undo()

    def tensor_of(self, parameter: nn.Parameter, read: Callable[[str], Tensor]) -> Tensor:
        """The values of one of the model's parameters on meta, of what `read` gives by name."""
        return self._stored(parameter).made(read)

    def rows_of(self, name: str) -> Rows | None:
        """Where the folder has the rows of a layer's weight: by tensor, their places in it.

        Args:
            name: of a layer, or of a parameter that is the whole weight of one.

        Returns:
            None where the folder has no such weight, or has it as no matrices called `.weight`.
        """
        if name not in self._rows:
            stored = self.stored.get(name + WEIGHT, self.stored.get(name))
            self._rows[name] = None if stored is None else stored.rows(self.base.shape)
        return self._rows[name]

    def _stored(self, parameter: nn.Parameter) -> StoredParameter:
        """What makes up a parameter."""
        names = self._names[id(parameter)]
        stored = next((self.stored[name] for name in names if name in self.stored), None)
        if stored is None:
            raise _no_tensor(self.base, names[0], parameter, "no such tensor")
        return stored

    def check_shape(self, parameter: nn.Parameter) -> None:
        """Raise an `OptionError` unless the folder has a parameter's elements; no data is read."""
        stored = self._stored(parameter)
        made = stored.made(lambda name: torch.empty(self.base.shape(name), device="meta"))
        if made.shape != parameter.shape:
            found = f"shape {list(made.shape)}"
            raise _no_tensor(self.base, next(iter(stored.tensors)), parameter, found)

    def buffers_of(self, module: nn.Module) -> dict[str, StoredParameter]:
        """The buffers of its own that the folder holds."""
        path = self._paths[module]
        full = {name: f"{path}.{name}" if path else name for name in module._buffers}
        return {name: self.stored[other] for name, other in full.items() if other in self.stored}


def _no_tensor(base: FolderReader, name: str, parameter: nn.Parameter, found: str) -> OptionError:
    return OptionError(
        f"{name} in the folder {str(base.path)!r}",
        found=found,
        needed=f"the tensor of shape {list(parameter.shape)} that the model of the folder's "
        "config.json has",
        remedy="Save the model anew with save_pretrained, from the class that config.json names; "
        "or load it and call fxquant.quantize.",
    )


class _Filling:
    """Modules on their way to values and back. Parameters that are tied have one tensor."""

    def __init__(self, weights: ModelWeights, read: Callable[[str], Tensor]) -> None:
        self.weights, self.read = weights, read
        self._made: dict[nn.Parameter, nn.Parameter] = {}
        self._empty: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._full: set[nn.Module] = set()

    def fill(self, module: nn.Module) -> None:
        """Give a module the values that it owns itself, unless it has them."""
        if module in self._full:
            return
        self._full.add(module)
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta:
                continue
            if parameter not in self._made:
                tensor = self.weights.tensor_of(parameter, self.read)
                self._made[parameter] = nn.Parameter(tensor, requires_grad=False)
            self._empty.append((module, name, parameter))
            module._parameters[name] = self._made[parameter]
        for name, stored in self.weights.buffers_of(module).items():
            module._buffers[name] = stored.made(self.read)

    def undo(self) -> None:
        """Take the values back."""
        for module, name, parameter in self._empty:
            module._parameters[name] = parameter
        self._made.clear()
