"""Small Hugging Face models of many architectures, built from configs: nothing is downloaded."""

import torch
import transformers as hf
from torch import Tensor, nn

from tests.zoo_more import MORE
from tests.zoo_tools import (
    GROUPED,
    VISION,
    VOCABULARY,
    WIDTH,
    Entry,
    audio,
    clip_config,
    config,
    encoder_decoder,
    gpt,
    image_and_text,
    masked,
    model,
    pixels,
    wave,
)

ZOO: dict[str, Entry] = {
    "albert": model("AlbertModel", lambda: config("Albert", embedding_size=32), masked),
    "bart": model(
        "BartModel",
        lambda: hf.BartConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=2, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_position_embeddings=64, pad_token_id=0,
        ),
        encoder_decoder,
    ),
    "bert": model("BertModel", lambda: config("Bert"), masked),
    "bloom": model(
        "BloomForCausalLM",
        lambda: hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=4),
    ),
    "clip": model("CLIPModel", lambda: clip_config("CLIP"), image_and_text),
    "deberta_v2": model(
        "DebertaV2Model",
        lambda: config("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
        masked,
    ),
    "distilbert": model(
        "DistilBertModel",
        lambda: hf.DistilBertConfig(
            vocab_size=VOCABULARY, dim=WIDTH, hidden_dim=96, n_layers=2, n_heads=4
        ),
        masked,
    ),
    "electra": model("ElectraModel", lambda: config("Electra", embedding_size=32), masked),
    "falcon": model(
        "FalconForCausalLM",
        lambda: hf.FalconConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
            pad_token_id=0,
        ),
    ),
    "gemma": model("GemmaForCausalLM", lambda: config("Gemma", head_dim=16, **GROUPED)),
    "gemma2": model("Gemma2ForCausalLM", lambda: config("Gemma2", head_dim=16, **GROUPED)),
    "gpt2": model("GPT2LMHeadModel", lambda: gpt("GPT2"), masked),
    "gpt_neox": model("GPTNeoXForCausalLM", lambda: config("GPTNeoX")),
    "gptj": model("GPTJForCausalLM", lambda: gpt("GPTJ", rotary_dim=8)),
    "llama": model("LlamaForCausalLM", lambda: config("Llama", **GROUPED), masked),
    "mamba": model(
        "MambaForCausalLM",
        lambda: hf.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, state_size=8,
            use_cache=False,
        ),
    ),
    "mistral": model("MistralForCausalLM", lambda: config("Mistral", **GROUPED)),
    "mixtral": model(
        "MixtralForCausalLM",
        lambda: config("Mixtral", num_local_experts=4, num_experts_per_tok=2, **GROUPED),
    ),
    "mpnet": model("MPNetModel", lambda: config("MPNet"), masked),
    "opt": model(
        "OPTForCausalLM",
        lambda: config("OPT", ffn_dim=96, word_embed_proj_dim=WIDTH, hidden_size=WIDTH),
        masked,
    ),
    "phi": model("PhiForCausalLM", lambda: config("Phi")),
    "phi3": model("Phi3ForCausalLM", lambda: config("Phi3", **GROUPED)),
    "qwen2": model("Qwen2ForCausalLM", lambda: config("Qwen2", **GROUPED)),
    "qwen3": model("Qwen3ForCausalLM", lambda: config("Qwen3", head_dim=16, **GROUPED)),
    "roberta": model("RobertaModel", lambda: config("Roberta"), masked),
    "siglip": model("SiglipModel", lambda: clip_config("Siglip"), image_and_text),
    "stablelm": model("StableLmForCausalLM", lambda: config("StableLm", **GROUPED)),
    "swin": model(
        "SwinModel",
        lambda: hf.SwinConfig(
            image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4],
            window_size=4,
        ),
        pixels,
    ),
    "t5": model(
        "T5Model",
        lambda: hf.T5Config(
            vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=96, num_layers=2, num_heads=4
        ),
        encoder_decoder,
    ),
    "vit": model("ViTModel", lambda: config("ViT", **VISION), pixels),
    "wav2vec2": model(
        "Wav2Vec2Model",
        lambda: config(
            "Wav2Vec2", conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 4),
            num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        wave,
    ),
    "whisper": model(
        "WhisperModel",
        lambda: hf.WhisperConfig(
            vocab_size=VOCABULARY, num_mel_bins=16, d_model=WIDTH, encoder_layers=2,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
            encoder_ffn_dim=96, decoder_ffn_dim=96, max_source_positions=20,
            max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=1,
        ),
        audio,
    ),
    **MORE,
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The seeded model of that name, in eval mode."""
    torch.manual_seed(0)
    return ZOO[name].build().to(dtype).eval()


def inputs(name: str, batch: int = 2, length: int = 9) -> dict[str, Tensor]:
    """Seeded inputs for it."""
    torch.manual_seed(1)
    return ZOO[name].inputs(batch, length)
