"""How the models of the zoo are made: configs of small widths, and inputs for them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

VOCABULARY = 120
WIDTH = 64


@dataclass(frozen=True)
class Entry:
    """An architecture: how to build it, and inputs for a batch and a length."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]


def tokens(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, VOCABULARY, (batch, length))}


def masked(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {**tokens(batch, length), "attention_mask": mask}


def encoder_decoder(batch: int, length: int) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": torch.randint(5, VOCABULARY, (batch, length + 2))}
    return {**tokens(batch, length), **decoder}


def pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def audio(batch: int, length: int) -> dict[str, Tensor]:
    features = {"input_features": torch.randn(batch, 16, 40)}
    return {**features, "decoder_input_ids": torch.randint(5, VOCABULARY, (batch, length))}


def wave(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 800 + 100 * length)}


def image_and_text(batch: int, length: int) -> dict[str, Tensor]:
    return {**tokens(batch, length), **pixels(batch, length)}


def config(name: str, **changes: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(hf, name + "Config")(**{**common, **changes})


def gpt(name: str, **changes: Any) -> Any:
    common = {
        "vocab_size": VOCABULARY,
        "n_embd": WIDTH,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return getattr(hf, name + "Config")(**{**common, **changes})


def model(cls: str, config: Callable[[], Any], inputs: Any = tokens) -> Entry:
    return Entry(lambda: getattr(hf, cls)(config()), inputs)


def clip_config(name: str) -> Any:
    text = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    vision = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if name == "CLIP":
        text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return getattr(hf, name + "Config")(text_config=text, vision_config=vision)


VISION = {"image_size": 32, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2}
