"""The byte-level language model that fxquant ships, as a Llama of transformers."""

from transformers import LlamaConfig, LlamaForCausalLM

from fxquant.demo import language_model as demo

PARTS = {"embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
BLOCK_PARTS = {
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention": "self_attn", "feed_forward": "mlp",
}  # fmt: skip


def embedded_llama() -> LlamaForCausalLM:
    """The language model that fxquant ships, in the class of transformers."""
    config = LlamaConfig(
        vocab_size=demo.VOCABULARY, hidden_size=demo.WIDTH, intermediate_size=demo.HIDDEN,
        num_hidden_layers=demo.LAYERS, num_attention_heads=demo.HEADS,
        max_position_embeddings=demo.CONTEXT, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    state = {}
    for name, tensor in demo.load_language_model().state_dict().items():
        first, *rest = name.split(".")
        if first == "blocks":
            number, part, *inner = rest
            name = ".".join(["model.layers", number, BLOCK_PARTS[part], *inner])
        else:
            name = ".".join([PARTS[first], *rest])
        state[name] = tensor
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()
