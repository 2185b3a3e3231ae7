"""More architectures of the zoo: encoders, decoders, vision, audio, several inputs, time series."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.zoo_tools import (
    GROUPED,
    VISION,
    VOCABULARY,
    WIDTH,
    Entry,
    config,
    encoder_decoder,
    gpt,
    masked,
    model,
    pixels,
    tokens,
    wave,
)

FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
FEW_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]}
MIXED_ATTENTION = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def layout(batch: int, length: int) -> dict[str, Tensor]:
    """Tokens with boxes."""
    boxes = torch.randint(0, 60, (batch, length, 4))
    boxes[..., 2:] += boxes[..., :2]
    return {**masked(batch, length), "bbox": boxes}


def images(size: int) -> Any:
    return lambda batch, length: {"pixel_values": torch.randn(batch, 3, size, size)}


def video(batch: int, length: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 4, 3, 32, 32)}


def spectrogram(batch: int, length: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 24, 16)}


def series(batch: int, length: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(batch, 32, 3)}


def steps(batch: int, length: int) -> dict[str, Tensor]:
    """States, actions and rewards of a game."""
    return {
        "states": torch.randn(batch, length, 17),
        "actions": torch.randn(batch, length, 4),
        "rewards": torch.randn(batch, length, 1),
        "returns_to_go": torch.randn(batch, length, 1),
        "timesteps": torch.arange(length).repeat(batch, 1),
        "attention_mask": torch.ones(batch, length),
    }


def prompt(count: int) -> Any:
    """Tokens that begin with places for `count` pieces of an image."""

    def inputs(batch: int, length: int) -> dict[str, Tensor]:
        places = torch.full((batch, count), 4)
        text = tokens(batch, length)["input_ids"]
        return {"input_ids": torch.cat((places, text), 1), **pixels(batch, length)}

    return inputs


def speech(batch: int, length: int) -> dict[str, Tensor]:
    features = {"input_features": torch.randn(batch, 40, 20)}
    return {**features, "decoder_input_ids": tokens(batch, length)["input_ids"]}


def encoder(name: str, inputs: Any = masked, **changes: Any) -> Entry:
    return model(f"{name}Model", lambda: config(name, **changes), inputs)


def decoder(name: str, **changes: Any) -> Entry:
    return model(f"{name}ForCausalLM", lambda: config(name, **changes))


def vision_config(name: str, **changes: Any) -> Any:
    common = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, **VISION}
    return getattr(hf, name + "Config")(**{**common, **changes})


def vision(name: str, inputs: Any = pixels, **changes: Any) -> Entry:
    return model(f"{name}Model", lambda: vision_config(name, **changes), inputs)


def translator_config(name: str, **changes: Any) -> Any:
    """One layer on either side: what is between the sides is what is new."""
    common = {"vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1}
    common |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 96}
    common |= {"decoder_ffn_dim": 96, "max_position_embeddings": 64, "pad_token_id": 0}
    common |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return getattr(hf, name + "Config")(**{**common, **changes})


def translator(name: str, **changes: Any) -> Entry:
    return model(f"{name}Model", lambda: translator_config(name, **changes), encoder_decoder)


def t5_config(name: str, **changes: Any) -> Any:
    common = {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 96}
    common |= {"num_layers": 1, "num_heads": 4}
    return getattr(hf, name + "Config")(**{**common, **changes})


def listener(name: str, **changes: Any) -> Entry:
    common = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4)}
    common |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16}
    common |= {"num_conv_pos_embedding_groups": 4}
    return model(f"{name}Model", lambda: config(name, **{**common, **changes}), wave)


def bert_to_bert() -> Any:
    """Two models joined; the first without the pooler, which nothing would call."""
    asked = config("Bert", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    return hf.EncoderDecoderModel(
        encoder=hf.BertModel(config("Bert", num_hidden_layers=1), add_pooling_layer=False),
        decoder=hf.BertLMHeadModel(asked),
    )


def llama_text() -> dict[str, Any]:
    return {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip


def llava_config() -> Any:
    seeing = {"model_type": "clip_vision_model", "hidden_size": WIDTH, "intermediate_size": 96}
    seeing |= {"num_hidden_layers": 2, "num_attention_heads": 4, "projection_dim": WIDTH, **VISION}
    return hf.LlavaConfig(
        vision_config=seeing, text_config=llama_text(), image_token_index=4,
        vision_feature_layer=-1,
    )  # fmt: skip


def detr_config() -> Any:
    backbone = hf.ResNetConfig(embedding_size=16, out_features=["stage4"], **STAGES)
    return hf.DetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone=None, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
        decoder_ffn_dim=96, num_queries=6,
    )  # fmt: skip


MORE: dict[str, Entry] = {
    # encoders of text
    "big_bird": encoder("BigBird", attention_type="original_full"),
    "deberta": encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "eurobert": encoder("EuroBert"),
    "fnet": encoder("FNet", tokens),
    "ibert": encoder("IBert"),
    "layoutlm": encoder("LayoutLM", layout),
    "mobilebert": encoder(
        "MobileBert", embedding_size=32, intra_bottleneck_size=32, true_hidden_size=32
    ),
    "modernbert": encoder("ModernBert"),
    "nomic_bert": encoder("NomicBert"),
    "rembert": encoder("RemBert", input_embedding_size=32, output_embedding_size=32),
    "roberta_prelayernorm": encoder("RobertaPreLayerNorm"),
    "roformer": encoder("RoFormer"),
    "splinter": encoder("Splinter"),
    "squeezebert": encoder("SqueezeBert", embedding_size=WIDTH),
    "xmod": encoder("Xmod", languages=["en"], default_language="en"),
    "xlm": model(
        "XLMModel",
        lambda: hf.XLMConfig(
            vocab_size=VOCABULARY, emb_dim=WIDTH, n_layers=2, n_heads=4, max_position_embeddings=64
        ),
        masked,
    ),
    "xlnet": model(
        "XLNetModel",
        lambda: hf.XLNetConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2, n_head=4, d_inner=96
        ),
        masked,
    ),
    # decoders
    "apertus": decoder("Apertus", **GROUPED),
    "biogpt": decoder("BioGpt"),
    "bitnet": decoder("BitNet", **GROUPED),
    "cohere2": decoder("Cohere2", **GROUPED),
    "ctrl": model("CTRLLMHeadModel", lambda: gpt("CTRL", dff=96)),
    "decision_transformer": model(
        "DecisionTransformerModel",
        lambda: hf.DecisionTransformerConfig(
            state_dim=17, act_dim=4, hidden_size=WIDTH, max_ep_len=64, n_layer=2, n_head=4
        ),
        steps,
    ),
    "deepseek_v3": decoder(
        "DeepseekV3", moe_intermediate_size=64, n_routed_experts=4, num_experts_per_tok=2,
        n_group=2, topk_group=1, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, first_k_dense_replace=1, num_key_value_heads=4,
    ),
    "diffllama": decoder("DiffLlama", **GROUPED),
    "gemma3": model(
        "Gemma3ForCausalLM",
        lambda: config("Gemma3Text", head_dim=16, **MIXED_ATTENTION, **GROUPED),
    ),
    "glm": decoder("Glm", head_dim=16, **GROUPED),
    "gpt_bigcode": model("GPTBigCodeForCausalLM", lambda: gpt("GPTBigCode"), masked),
    "gpt_neo": model(
        "GPTNeoForCausalLM",
        lambda: hf.GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, num_layers=2, num_heads=4,
            attention_types=[[["global", "local"], 1]], window_size=4, max_position_embeddings=64,
        ),
        masked,
    ),
    "gpt_oss": decoder("GptOss", head_dim=16, **FEW_LOCAL_EXPERTS, **GROUPED),
    "granite": decoder("Granite", **GROUPED),
    "granitemoe": decoder("GraniteMoe", **FEW_LOCAL_EXPERTS, **GROUPED),
    "imagegpt": model("ImageGPTModel", lambda: gpt("ImageGPT")),
    "lfm2": decoder(
        "Lfm2", full_attn_idxs=[1], layer_types=["conv", "full_attention"], **GROUPED
    ),
    "mpt": model(
        "MptForCausalLM",
        lambda: hf.MptConfig(
            d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=VOCABULARY
        ),
    ),
    "nemotron": decoder("Nemotron", **GROUPED),
    "olmo": decoder("Olmo", **GROUPED),
    "olmo2": decoder("Olmo2", **GROUPED),
    "smollm3": decoder("SmolLM3", **GROUPED),
    "xglm": decoder("XGLM", d_model=WIDTH, ffn_dim=96, num_layers=2, attention_heads=4),
    # encoders with decoders
    "bert_to_bert": Entry(bert_to_bert, encoder_decoder),
    "m2m_100": translator("M2M100"),
    "marian": translator("Marian"),
    "prophetnet": model(
        "ProphetNetModel",
        lambda: hf.ProphetNetConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, encoder_ffn_dim=96, decoder_ffn_dim=96,
            num_encoder_layers=1, num_decoder_layers=1, num_encoder_attention_heads=4,
            num_decoder_attention_heads=4, max_position_embeddings=64,
        ),
        encoder_decoder,
    ),
    "switch": model(
        "SwitchTransformersModel",
        lambda: t5_config(
            "SwitchTransformers", num_experts=4, num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
        ),
        encoder_decoder,
    ),
    # images and films
    "beit": vision("Beit", use_relative_position_bias=True),
    "convnext": model(
        "ConvNextModel", lambda: hf.ConvNextConfig(**STAGES), images(64)
    ),
    "data2vec_vision": vision("Data2VecVision"),
    "detr": model("DetrForObjectDetection", detr_config, images(64)),
    "dinov2": vision("Dinov2"),
    "dinov3": vision("DINOv3ViT"),
    "focalnet": model(
        "FocalNetModel",
        lambda: hf.FocalNetConfig(
            image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], focal_levels=[2, 2],
            focal_windows=[3, 3],
        ),
        pixels,
    ),
    "hiera": model(
        "HieraModel",
        lambda: hf.HieraConfig(
            embed_dim=32, image_size=[64, 64], depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]
        ),
        images(64),
    ),
    "poolformer": model("PoolFormerModel", lambda: hf.PoolFormerConfig(**STAGES), images(64)),
    "pvt_v2": model(
        "PvtV2Model",
        lambda: hf.PvtV2Config(image_size=64, num_attention_heads=[1, 2, 4, 4], **STAGES),
        images(64),
    ),
    "swinv2": model(
        "Swinv2Model",
        lambda: hf.Swinv2Config(
            image_size=32, patch_size=4, embed_dim=32, depths=[1, 1], num_heads=[2, 4],
            window_size=4,
        ),
        pixels,
    ),
    "timesformer": vision("Timesformer", video, num_frames=4),
    "videomae": vision("VideoMAE", video, num_frames=4),
    "vivit": vision("Vivit", video, num_frames=4, tubelet_size=[2, 8, 8]),
    "yolos": model(
        "YolosForObjectDetection",
        lambda: vision_config("Yolos", image_size=[32, 32], num_detection_tokens=5),
        pixels,
    ),
    # several kinds of inputs
    "llava": model("LlavaForConditionalGeneration", llava_config, prompt(16)),
    "vilt": encoder(
        "Vilt",
        lambda b, n: {
            **masked(b, n), **pixels(b, n), "pixel_mask": torch.ones(b, 32, 32, dtype=torch.long),
        },
        max_image_length=-1, **VISION,
    ),
    # sound
    "audio_spectrogram": model(
        "ASTModel",
        lambda: hf.ASTConfig(
            hidden_size=WIDTH, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            patch_size=4, max_length=24, num_mel_bins=16, frequency_stride=4, time_stride=4,
        ),
        spectrogram,
    ),
    "sew": listener("SEW", squeeze_factor=2),
    "speech_to_text": model(
        "Speech2TextModel",
        lambda: hf.Speech2TextConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=96,
            decoder_ffn_dim=96, max_source_positions=200, max_target_positions=64,
            input_feat_per_channel=20, conv_channels=32, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1,
        ),
        speech,
    ),
    "unispeech": listener("UniSpeech"),
    "wav2vec2_bert": model(
        "Wav2Vec2BertModel",
        lambda: config("Wav2Vec2Bert", feature_projection_input_dim=40),
        lambda b, n: {"input_features": torch.randn(b, 20 + n, 40)},
    ),
    "wavlm": listener("WavLM"),
    # time series
    "patchtsmixer": model(
        "PatchTSMixerForPrediction",
        lambda: hf.PatchTSMixerConfig(
            num_input_channels=3, context_length=32, patch_length=8, patch_stride=8,
            d_model=WIDTH, num_layers=2, prediction_length=8,
        ),
        series,
    ),
    "patchtst": model(
        "PatchTSTForPrediction",
        lambda: hf.PatchTSTConfig(
            num_input_channels=3, context_length=32, patch_length=8, patch_stride=8,
            d_model=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_dim=96,
            prediction_length=8,
        ),
        series,
    ),
}  # fmt: skip
