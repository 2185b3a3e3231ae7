"""A folder with a Hugging Face checkpoint as a model, and texts as its calibration data."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.errors import OptionError

TOKENS = 256  # of a row
TEXT_BATCH_ROWS = 4  # of a batch


def load_folder(folder: Path) -> nn.Module:
    """The model of the class that the folder's config names, in eval mode.

    Raises:
        OptionError: transformers is missing, or the folder holds no checkpoint that it can load.
    """
    transformers = _transformers()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        name = (config.architectures or ["AutoModel"])[0]
        loader = getattr(transformers, name, transformers.AutoModel)
        return loader.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, KeyError) as error:
        raise OptionError(
            f"MODEL {str(folder)!r}",
            found=f"a folder that transformers cannot load: {error}",
            needed="a Hugging Face checkpoint with config.json and weights",
            remedy="Name a folder that save_pretrained wrote.",
        ) from error


def text_batches(path: Path, folder: Path) -> list[dict[str, Tensor]]:
    """The text as batches of token ids: rows of 256 tokens, or one row for each line if short.

    Raises:
        OptionError: the folder has no tokenizer, or the text is empty or no text.
    """
    transformers = _transformers()
    if not folder.is_dir():
        raise OptionError(
            f"--data {str(path)!r}",
            found=f"that it cannot be read as text: the MODEL {str(folder)!r} is no folder with a "
            "tokenizer",
            needed="batches, or a text and such a folder",
            remedy="Name a function that returns batches, such as path/to/file.py:function, or a "
            ".npy or .safetensors file of inputs.",
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        ids = tokenizer(path.read_text("utf-8"), return_tensors="pt", truncation=False)["input_ids"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OptionError(
            f"--data {str(path)!r}",
            found=f"that it cannot be read as text for {str(folder)!r}: {error}",
            needed="a UTF-8 text, and a MODEL folder that has a tokenizer",
            remedy="Save the tokenizer beside the model, or pass a function that returns batches.",
        ) from error
    if ids.shape[1] < 2:
        raise OptionError(
            f"--data {str(path)!r}",
            found=f"a text of {ids.shape[1]} tokens",
            needed="at least 2",
            remedy="Use a text like those that the model will read; some pages are enough.",
        )
    width = min(TOKENS, ids.shape[1])
    rows = ids[0, : ids.shape[1] // width * width].reshape(-1, width)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)}
        for part in rows.split(TEXT_BATCH_ROWS)
    ]


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise OptionError(
            "transformers",
            found="that it is not installed",
            needed="it, to read a Hugging Face checkpoint",
            remedy="pip install transformers, or name a function that returns the model.",
        ) from error
