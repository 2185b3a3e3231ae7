"""Small Hugging Face models of many architectures, built from configs: nothing is downloaded."""

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


def _tokens(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(5, VOCABULARY, (batch, length))}


def _masked(batch: int, length: int) -> dict[str, Tensor]:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length - 2 :] = 0
    return {**_tokens(batch, length), "attention_mask": mask}


def _encoder_decoder(batch: int, length: int) -> dict[str, Tensor]:
    decoder = {"decoder_input_ids": torch.randint(5, VOCABULARY, (batch, length + 2))}
    return {**_tokens(batch, length), **decoder}


def _pixels(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 32, 32)}


def _audio(batch: int, length: int) -> dict[str, Tensor]:
    features = {"input_features": torch.randn(batch, 16, 40)}
    return {**features, "decoder_input_ids": torch.randint(5, VOCABULARY, (batch, length))}


def _wave(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 800 + 100 * length)}


def _image_and_text(batch: int, length: int) -> dict[str, Tensor]:
    return {**_tokens(batch, length), **_pixels(batch, length)}


def _config(name: str, **changes: Any) -> Any:
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


def _gpt(name: str, **changes: Any) -> Any:
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


def _model(cls: str, config: Callable[[], Any], inputs: Any = _tokens) -> Entry:
    return Entry(lambda: getattr(hf, cls)(config()), inputs)


def _clip_config(name: str) -> Any:
    text = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 96}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32}
    vision = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if name == "CLIP":
        text |= {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    return getattr(hf, name + "Config")(text_config=text, vision_config=vision)


_VISION = {"image_size": 32, "patch_size": 8}
_GROUPED = {"num_key_value_heads": 2}

ZOO: dict[str, Entry] = {
    "albert": _model("AlbertModel", lambda: _config("Albert", embedding_size=32), _masked),
    "bart": _model(
        "BartModel",
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0,
        ),
        _encoder_decoder,
    ),
    "bert": _model("BertModel", lambda: _config("Bert"), _masked),
    "bloom": _model(
        "BloomForCausalLM",
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4),
    ),
    "clip": _model("CLIPModel", lambda: _clip_config("CLIP"), _image_and_text),
    "deberta_v2": _model(
        "DebertaV2Model",
        lambda: _config("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        _masked,
    ),
    "distilbert": _model(
        "DistilBertModel",
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=96, n_layers=2, n_heads=4
        ),
        _masked,
    ),
    "electra": _model("ElectraModel", lambda: _config("Electra", embedding_size=32), _masked),
    "falcon": _model(
        "FalconForCausalLM",
        lambda: hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0,
        ),
    ),
    "gemma": _model("GemmaForCausalLM", lambda: _config("Gemma", head_dim=16, **_GROUPED)),
    "gemma2": _model("Gemma2ForCausalLM", lambda: _config("Gemma2", head_dim=16, **_GROUPED)),
    "gpt2": _model("GPT2LMHeadModel", lambda: _gpt("GPT2"), _masked),
    "gpt_neox": _model("GPTNeoXForCausalLM", lambda: _config("GPTNeoX")),
    "gptj": _model("GPTJForCausalLM", lambda: _gpt("GPTJ", rotary_dim=8)),
    "llama": _model("LlamaForCausalLM", lambda: _config("Llama", **_GROUPED), _masked),
    "mamba": _model(
        "MambaForCausalLM",
        lambda: hf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=8,
            use_cache=False,
        ),
    ),
    "mistral": _model("MistralForCausalLM", lambda: _config("Mistral", **_GROUPED)),
    "mixtral": _model(
        "MixtralForCausalLM",
        lambda: _config("Mixtral", num_local_experts=4, num_experts_per_tok=2, **_GROUPED),
    ),
    "mpnet": _model("MPNetModel", lambda: _config("MPNet"), _masked),
    "opt": _model(
        "OPTForCausalLM",
        lambda: _config("OPT", ffn_dim=96, word_embed_proj_dim=WIDTH, hidden_size=WIDTH),
        _masked,
    ),
    "phi": _model("PhiForCausalLM", lambda: _config("Phi")),
    "phi3": _model("Phi3ForCausalLM", lambda: _config("Phi3", **_GROUPED)),
    "qwen2": _model("Qwen2ForCausalLM", lambda: _config("Qwen2", **_GROUPED)),
    "qwen3": _model("Qwen3ForCausalLM", lambda: _config("Qwen3", head_dim=16, **_GROUPED)),
    "roberta": _model("RobertaModel", lambda: _config("Roberta"), _masked),
    "siglip": _model("SiglipModel", lambda: _clip_config("Siglip"), _image_and_text),
    "stablelm": _model("StableLmForCausalLM", lambda: _config("StableLm", **_GROUPED)),
    "swin": _model(
        "SwinModel",
        lambda: hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4],
            window_size=4,
        ),
        _pixels,
    ),
    "t5": _model(
        "T5Model",
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4
        ),
        _encoder_decoder,
    ),
    "vit": _model("ViTModel", lambda: _config("ViT", **_VISION), _pixels),
    "wav2vec2": _model(
        "Wav2Vec2Model",
        lambda: _config(
            "Wav2Vec2", conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        _wave,
    ),
    "whisper": _model(
        "WhisperModel",
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=16, d_model=WIDTH, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20,
            max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        _audio,
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The seeded model of that name, in eval mode."""
    torch.manual_seed(0)
    return ZOO[name].build().to(dtype).eval()


def inputs(name: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Seeded inputs for it."""
    torch.manual_seed(1)
    return ZOO[name].inputs(batch, length)
