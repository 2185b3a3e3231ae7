"""The embedded model: a byte-level causal language model of 3.5 million parameters.

Llama-like (RMSNorm, rotary positions, SwiGLU, tied embedding and `lm_head`), trained on
public-domain text by `examples/train_language_model.py`. `README.md` in this folder states the
provenance and the licence.
"""

from importlib import resources
from typing import cast

import torch
import torch.nn.functional as F
from safetensors.torch import load as safetensors_load
from torch import Tensor, nn

VOCABULARY = 256  # a token is a byte
WIDTH = 256
HIDDEN = 768
HEADS = 4
LAYERS = 4
CONTEXT = 256


class KeyValueCache:
    """Keys and values of the tokens seen, for one layer, each [batch, heads, past, head]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the newest tokens' keys and values and return all of them."""
        self.keys = keys if self.keys is None else torch.cat((self.keys, keys), dim=2)
        self.values = values if self.values is None else torch.cat((self.values, values), dim=2)
        return self.keys, self.values


class Rotary(nn.Module):
    """Angles that grow with the position, for rotating pairs of channels (RoFormer, 3.2)."""

    frequencies: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        frequencies = 10000.0 ** (-torch.arange(0, head_width, 2).float() / head_width)
        self.register_buffer("frequencies", frequencies, persistent=False)  # [head / 2]

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [tokens, head], of `positions` [tokens]."""
        angles = positions.unsqueeze(1) * self.frequencies
        angles = torch.cat((angles, angles), dim=1)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate `x` [batch, heads, tokens, head]; the pairs are (channel, channel + head / 2)."""
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(
        self, x: Tensor, cosines: Tensor, sines: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Mix `x` [batch, tokens, width]; with a cache, `x` holds only the newest tokens."""
        q = rotate(_split_heads(self.q_proj(x)), cosines, sines)  # [batch, heads, tokens, head]
        k = rotate(_split_heads(self.k_proj(x)), cosines, sines)
        v = _split_heads(self.v_proj(x))
        is_causal = True
        if cache is not None:
            is_causal = cache.keys is None  # later, the one new token sees all before it
            k, v = cache.append(k, v)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return cast(Tensor, self.o_proj(mixed.transpose(1, 2).flatten(2)))


def _split_heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU (GLU Variants Improve Transformer, equation 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [..., width] to the same shape."""
        return cast(Tensor, self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))


class Block(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.attention = Attention()
        self.feed_forward_norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.feed_forward = FeedForward()

    def forward(
        self, x: Tensor, cosines: Tensor, sines: Tensor, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Map `x` [batch, tokens, width] to the same shape."""
        x = x + self.attention(self.attention_norm(x), cosines, sines, cache)
        return cast(Tensor, x + self.feed_forward(self.feed_forward_norm(x)))


class ByteLanguageModel(nn.Module):
    """Predicts the next byte of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.rotary = Rotary(WIDTH // HEADS)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-5)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [batch, tokens, 256] of the byte that follows each of `tokens` [batch, tokens]."""
        cosines, sines = self.rotary(torch.ones_like(tokens[0]).cumsum(0) - 1)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cosines, sines)
        return cast(Tensor, self.lm_head(self.norm(x)))

    @torch.inference_mode()
    def generate(self, tokens: Tensor, steps: int) -> Tensor:
        """Append the `steps` likeliest bytes to `tokens` [1, tokens], using a cache."""
        caches = [KeyValueCache() for _ in self.blocks]
        newest, seen = tokens, 0
        for _ in range(steps):
            cosines, sines = self.rotary(torch.arange(seen, seen + newest.shape[1]))
            x = self.embedding(newest)
            for block, cache in zip(self.blocks, caches, strict=True):
                x = block(x, cosines, sines, cache)
            seen += newest.shape[1]
            newest = self.lm_head(self.norm(x[:, -1:])).argmax(-1)
            tokens = torch.cat((tokens, newest), dim=1)
        return tokens


def load_language_model() -> ByteLanguageModel:
    """The trained model, in float32 and in eval mode."""
    model = ByteLanguageModel()
    state = safetensors_load(_resource("language_model.safetensors"))
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=False)
    model.lm_head.weight = model.embedding.weight
    return model.eval()


def calibration_tokens() -> Tensor:
    """Tokens [samples, 256] from the training text, for calibration."""
    return _windows(_resource("calibration.txt"))


def heldout_tokens() -> Tensor:
    """Tokens [samples, 256] that neither training nor calibration saw."""
    return _windows(_resource("heldout.txt"))


def _windows(text: bytes) -> Tensor:
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)


def _resource(name: str) -> bytes:
    return resources.files(__package__).joinpath(name).read_bytes()
