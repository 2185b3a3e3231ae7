"""What a folder calls the parameters of its model's class.

transformers changed the classes of many models and kept their folders: a parameter may have another
name there, or be several tensors. Its own table of conversions says which; this file asks it.

before: model.layers.0.block_sparse_moe.experts.3.w1.weight [out, in]; so for each expert, and w3
after:  model.layers.0.mlp.experts.gate_up_proj [experts, 2 · out, in]
"""

import copy
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError

WEIGHT = ".weight"  # how the name of a layer's weight ends
FEW_COLUMNS = 4  # that tell where a row of a matrix went
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class StoredParameter:
    """The tensors of a folder that make up a parameter or buffer of a model.

    Attributes:
        name: in the model.
        tensors: their names in the folder, and the pattern of the conversion that each met.
        model: of the class that has the parameter.
        conversion: of transformers; None where the one tensor is the parameter.
    """

    name: str
    tensors: dict[str, str]
    model: nn.Module = field(repr=False)
    conversion: Any = None

    def made(self, read: Callable[[str], Tensor]) -> Tensor:
        """The parameter, of what `read` gives for the name of each tensor.

        Raises:
            OptionError: the conversion does not take them.
        """
        if self.conversion is None:
            return read(next(iter(self.tensors)))
        conversion = copy.deepcopy(self.conversion)
        for name, pattern in self.tensors.items():
            conversion.add_tensor(self.name, name, pattern, lambda name=name: read(name))
        try:
            config: Any = self.model.config
            found = conversion.convert(self.name, model=self.model, config=config)[self.name]
        except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
            raise OptionError(
                self.name,
                found=f"that its {len(self.tensors)} tensors do not make it up: {error}",
                needed="the tensors of the model that config.json describes",
                remedy="Save the model anew with save_pretrained.",
            ) from error
        made: Tensor = found[0] if isinstance(found, list) else found
        return made

    def rows(self, shape_of: Callable[[str], tuple[int, ...]]) -> Rows | None:
        """Which rows of the parameter, as a matrix [rows, inputs], each tensor has in its order.

        Args:
            shape_of: gives the shape of a tensor by its name.

        Returns:
            By tensor, whole numbers [its rows]; None where a tensor is no matrix called `.weight`,
            or is not made up of whole rows of this parameter.
        """
        shapes = {name: shape_of(name) for name in self.tensors}
        if any(len(s) != 2 or not name.endswith(WEIGHT) for name, s in shapes.items()):
            return None
        if self.conversion is None:
            return {name: torch.arange(shape[0]) for name, shape in shapes.items()}
        columns = min(FEW_COLUMNS, *(shape[1] for shape in shapes.values()))
        marks: Rows = {}
        count = 0  # of the elements that have a number
        for name, (rows, _) in shapes.items():
            numbers = torch.arange(count, count + rows * columns)
            marks[name], count = numbers.view(rows, columns), count + rows * columns
        made = self.made(marks.__getitem__)
        if made.shape[-1] != columns or made.numel() != count:
            return None
        made = made.reshape(-1, columns)
        if not torch.equal(made, made[:, :1] + torch.arange(columns)):
            return None
        places = torch.empty(count // columns, dtype=torch.int64)
        places[made[:, 0] // columns] = torch.arange(len(made))
        sizes = [shape[0] for shape in shapes.values()]
        return dict(zip(shapes, places.split(sizes), strict=True))


def stored_parameters(tensors: Iterable[str], model: nn.Module) -> dict[str, StoredParameter]:
    """What makes up each parameter and buffer of the model, by its name there.

    Args:
        tensors: names of a folder's.
        model: of the class that its config names.
    """
    own = model.state_dict(keep_vars=True)
    rename = _renaming(model, own)
    found: dict[str, StoredParameter] = {}
    for tensor in sorted(tensors, key=_in_order):
        name, pattern, conversion = rename(tensor)
        stored = found.setdefault(name, StoredParameter(name, {}, model, conversion))
        if not stored.tensors or conversion is not None:
            stored.tensors[tensor] = pattern
        for other in _other_results(name, conversion, own):
            found.setdefault(other, StoredParameter(other, stored.tensors, model, conversion))
    return {name: stored for name, stored in found.items() if name in own}


def _renaming(model: nn.Module, own: Mapping[str, Tensor]) -> Callable[[str], tuple[str, str, Any]]:
    """Gives for a tensor: the parameter, the pattern that it met, the conversion or None."""
    try:
        loading: Any = importlib.import_module("transformers.core_model_loading")
        table: Any = importlib.import_module("transformers.conversion_mapping")
    except ImportError:  # before version 5 folders had the names of the classes
        return lambda name: (name, name, None)
    entries = table.get_model_conversion_mapping(model)
    converters = [e for e in entries if isinstance(e, loading.WeightConverter)]
    renamings = [e for e in entries if isinstance(e, loading.WeightRenaming)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix: Any = getattr(model, "base_model_prefix", None)

    def rename(name: str) -> tuple[str, str, Any]:
        found, pattern = loading.rename_source_key(name, renamings, converters, prefix, own)
        if found not in own:  # the folder may have the names of the class, but for a prefix
            plain, _ = loading.rename_source_key(name, [], [], prefix, own)
            found, pattern = (plain, None) if plain in own else (found, pattern)
        return found, pattern or name, None if pattern is None else by_pattern[pattern]

    return rename


def _other_results(name: str, conversion: Any, own: Mapping[str, Tensor]) -> list[str]:
    """The other parameters that one conversion makes of the same tensors."""
    if conversion is None or len(conversion.target_patterns) == 1:
        return []
    first, *others = conversion.target_patterns
    made = [name.replace(first, other, 1) for other in others]
    return [other for other in made if other in own]


def _in_order(name: str) -> list[tuple[int, int | str]]:
    """So that expert 10 comes after expert 9."""
    parts = name.split(".")
    return [(0, int(part)) if part.isdigit() else (1, part) for part in parts]
