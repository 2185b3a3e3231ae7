"""A GGUF file: its tensors by the names of the Hugging Face model, and a copy with others."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fxquant.errors import OptionError

LEAST_MATCH_DB = 3.0  # of a quantized weight against the float one: less is another weight


@dataclass(frozen=True)
class Permutation:
    """The order of a weight's rows: rotary embeddings in llama.cpp pair other rows of a head.

    Attributes:
        heads: how many; 0 where the order is that of the model.
    """

    heads: int = 0

    def rows(self, values: np.ndarray) -> np.ndarray:
        """`values` [out, ...] in the order of the file."""
        if not self.heads:
            return values
        halves = values.reshape(self.heads, 2, -1, *values.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))

    def undone(self, values: np.ndarray) -> np.ndarray:
        """`values` [out, ...] of the file in the order of the model."""
        if not self.heads:
            return values
        pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


class GgufFile:
    """A file that llama.cpp's converter made.

    Args:
        library: gguf.
        path: of the file.

    Raises:
        OptionError: it cannot be read, or its architecture is unknown to the library.
    """

    def __init__(self, library: Any, path: str | os.PathLike[str]) -> None:
        self.library = library
        try:
            self.reader = library.GGUFReader(os.fspath(path))
            self._tensors = {tensor.name: tensor for tensor in self.reader.tensors}
            self.architecture = str(self._field("general.architecture"))
            known = {name: key for key, name in library.MODEL_ARCH_NAMES.items()}
            blocks = int(self._own("block_count"))
            self._names = library.get_tensor_name_map(known[self.architecture], blocks)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise OptionError(
                f"the file {os.fspath(path)!r}",
                found=f"that it cannot be read: {type(error).__name__}: {error}",
                needed="a GGUF file of the float model",
                remedy="Make it with llama.cpp's convert_hf_to_gguf.py.",
            ) from error

    def weight_name(self, module: str) -> str | None:
        """What the weight of a module is called here; None if it is not here."""
        return self._named(module, "weight")

    def bias_name(self, module: str) -> str | None:
        """What the bias of a module is called here; None if it is not here."""
        return self._named(module, "bias")

    def kind(self, name: str) -> str:
        """The name of the type of a tensor; of one that is not here that of floats."""
        return self._tensors[name].tensor_type.name if name in self._tensors else "F32"

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a quantized tensor, uint8 [rows, bytes]."""
        return np.array(self._tensors[name].data, np.uint8)

    def values(self, name: str) -> np.ndarray:
        """The float32 values of a tensor, rows first."""
        tensor = self._tensors[name]
        found = self.library.dequantize(tensor.data, tensor.tensor_type)
        return np.array(found, np.float32)

    def permutation(self, module: str, weight: np.ndarray) -> Permutation | None:
        """The order in which the rows of `weight` [out, in] lie here; None if it is another one."""
        own = self.values(str(self.weight_name(module)))
        if own.shape != weight.shape:
            return None
        candidates = [Permutation()]
        for key in ("attention.head_count", "attention.head_count_kv"):
            heads = self._own(key)
            if isinstance(heads, int) and heads and len(weight) % (2 * heads) == 0:
                candidates.append(Permutation(heads))
        best = min(candidates, key=lambda order: float(np.square(own - order.rows(weight)).sum()))
        error = float(np.square(own - best.rows(weight)).sum())
        return best if error * 10 ** (LEAST_MATCH_DB / 10) < float(np.square(own).sum()) else None

    def save(self, path: Path, replaced: Mapping[str, tuple[np.ndarray, Any]]) -> None:
        """Write a copy in which some tensors are others, given with their types."""
        writer = self.library.GGUFWriter(path, self.architecture)
        alignment = self._field("general.alignment")
        if alignment is not None:
            writer.data_alignment = alignment
        for field in self.reader.fields.values():
            if field.name.startswith("GGUF.") or field.name == "general.architecture":
                continue
            kind = field.types[0]
            is_array = kind == self.library.GGUFValueType.ARRAY
            inner = field.types[-1] if is_array else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
        for name, tensor in self._tensors.items():
            data, kind = replaced.get(name, (tensor.data, tensor.tensor_type))
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def _named(self, module: str, part: str) -> str | None:
        stem = self._names.get_name(module)
        name = f"{stem}.{part}"
        return name if stem is not None and name in self._tensors else None

    def _field(self, key: str) -> Any:
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def _own(self, key: str) -> Any:
        return self._field(f"{self.architecture}.{key}")
