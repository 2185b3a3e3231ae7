"""The Hugging Face folder of a model: its config, and its tensors one at a time."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fxquant.errors import OptionError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


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

    def tensor(self, name: str) -> Tensor:
        """The tensor called `name`."""
        return self._open[self.files[name]].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape; its data is not read."""
        return tuple(self._open[self.files[name]].get_slice(name).get_shape())
