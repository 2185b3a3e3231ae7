"""The blocks of a model: the one list of modules that holds the layers to quantize."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from fxquant.errors import OptionError

WHOLE_MODEL_REMEDY = "Load the model and call fxquant.quantize, or leave the data out."


@dataclass(frozen=True)
class BlockList:
    """Modules that run one after the other.

    Attributes:
        path: of the list in the model.
        blocks: in their order.
    """

    path: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)

    def name(self, number: int) -> str:
        """The path of a block in the model."""
        return f"{self.path}.{number}"

    def owner(self, name: str) -> int | None:
        """The number of the block that holds the layer or tensor called `name`."""
        if not name.startswith(f"{self.path}."):
            return None
        return int(name[len(self.path) + 1 :].partition(".")[0])


def find_blocks(model: nn.Module, chosen: Iterable[str]) -> BlockList:
    """The list of modules that holds the layers to quantize.

    Args:
        model: of any class.
        chosen: names of the layers to quantize. Those outside of the list do not count.

    Raises:
        OptionError: there is none, or there are several (an encoder and a decoder).
    """
    names = list(chosen)
    holding = [
        BlockList(path, blocks)
        for path, blocks in _outermost_lists(model)
        if any(name.startswith(f"{path}.") for name in names)
    ]
    if len(holding) == 1:
        return holding[0]
    paths = ", ".join(found.path for found in holding)
    raise OptionError(
        f"quantize_checkpoint with data, {type(model).__name__}",
        found=f"several lists of blocks: {paths}" if holding else "no list of blocks (ModuleList)",
        needed="one torch.nn.ModuleList, whose modules run one after the other",
        remedy=WHOLE_MODEL_REMEDY,
    )


def _outermost_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(inside or "\n"):
            inside = (*inside, f"{path}.")
            yield path, module
