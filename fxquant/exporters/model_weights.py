"""The tensors of a folder, read into the modules of a model on meta when they are needed."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from fxquant.errors import OptionError
from fxquant.exporters.folder_reader import FolderReader, ShardReader


class ModelWeights:
    """Gives modules of a model their values, and takes them back.

    Args:
        base: the folder.
        model: of the folder's class; parameters on meta.
    """

    def __init__(self, base: FolderReader, model: nn.Module) -> None:
        self.base, self.model = base, model
        self._paths = {module: path for path, module in model.named_modules()}
        self._names: dict[int, list[str]] = defaultdict(list)  # a tied parameter has several
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self._names[id(parameter)].append(name)

    def check(self) -> None:
        """Look for a tensor for each parameter; no data is read.

        Raises:
            OptionError: the folder has no such tensor, or one of another shape.
        """
        for parameter in self.model.parameters():
            self._name_of(parameter)

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
        """The values of one of the model's parameters on meta."""
        return read(self._name_of(parameter))

    def _name_of(self, parameter: nn.Parameter) -> str:
        """What the folder calls a parameter."""
        names = self._names[id(parameter)]
        name = next((name for name in names if name in self.base.files), None)
        found = "no such tensor" if name is None else f"shape {list(self.base.shape(name))}"
        if name is None or self.base.shape(name) != tuple(parameter.shape):
            raise OptionError(
                f"{names[0]} in the folder {str(self.base.path)!r}",
                found=found,
                needed=f"the tensor of shape {list(parameter.shape)} that the model of the "
                "folder's config.json has",
                remedy="Save the model anew with save_pretrained, from the class that config.json "
                "names; or load it and call fxquant.quantize.",
            )
        return name

    def buffers_of(self, module: nn.Module) -> dict[str, str]:
        """Which buffers of its own the folder holds, and under what name."""
        path = self._paths[module]
        full = {name: f"{path}.{name}" if path else name for name in module._buffers}
        return {name: other for name, other in full.items() if other in self.base.files}


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
        for name, full in self.weights.buffers_of(module).items():
            module._buffers[name] = self.read(full)

    def undo(self) -> None:
        """Take the values back."""
        for module, name, parameter in self._empty:
            module._parameters[name] = parameter
        self._made.clear()
