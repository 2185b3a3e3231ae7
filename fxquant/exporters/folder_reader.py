"""The Hugging Face folder of a model: its config, and its tensors one at a time."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.errors import OptionError, check_path
from fxquant.modules.linear import FLOAT_DTYPES
from fxquant.serialization.container import SAFETENSORS_DTYPES

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class NamedTensors(Protocol):
    """What tensors can be read from by name."""

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""


class ShardReader:
    """One safetensors file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="pt")

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self._file.keys()  # noqa: SIM118

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""
        tensor: Tensor = self._file.get_tensor(name)
        return tensor


class FolderReader:
    """What a folder with safetensors holds; tensors are read when they are asked for.

    Attributes:
        path: of the folder.
        config: what its config.json says.
        files: the file in which each tensor lies.

    Raises:
        OptionError: a file is missing or cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        check_path("folder", path)
        self.path = Path(path)
        try:
            self.config: dict[str, Any] = json.loads((self.path / CONFIG).read_text("utf-8"))
            self.files = self._files()
            self._open: dict[str, Any] = {
                file: safe_open(self.path / file, framework="pt")
                for file in dict.fromkeys(self.files.values())
            }
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise OptionError(
                f"the folder {os.fspath(path)!r}",
                found=f"that it cannot be read: {type(error).__name__}: {error}",
                needed=f"{CONFIG} and {WEIGHTS}, or shards and {INDEX}",
                remedy="Name a folder that save_pretrained wrote.",
            ) from error

    def _files(self) -> dict[str, str]:
        if (self.path / INDEX).exists():
            index = json.loads((self.path / INDEX).read_text("utf-8"))
            return {str(name): str(file) for name, file in index["weight_map"].items()}
        with safe_open(self.path / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)

    def has(self, name: str) -> bool:
        """Whether there is a tensor called `name`."""
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._open[self.files[name]].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; its data is not read."""
        return tuple(self._open[self.files[name]].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype | None:
        """Its dtype, where it is one that layers compute in; its data is not read."""
        kind = self._open[self.files[name]].get_slice(name).get_dtype()
        dtype = SAFETENSORS_DTYPES.get(kind)
        return dtype if dtype in FLOAT_DTYPES.values() else None

    def nbytes(self, name: str) -> int:
        """How many bytes it has; its data is not read."""
        kind = self._open[self.files[name]].get_slice(name).get_dtype()
        bits = int(re.sub(r"\D.*", "", re.sub(r"^\D+", "", kind)) or 8)  # BOOL has no number
        return math.prod(self.shape(name)) * bits // 8
