"""A quantized Llama in llama.cpp: the weights of fxquant in its blocks, its own kernels.

    pip install 'fxquant[gguf]' transformers llama-cpp-python
    python examples/run_in_llama_cpp.py

The model is the byte-level language model that fxquant ships, as a Llama of transformers. Models
that have a tokenizer of their own become a float GGUF file by llama.cpp's convert_hf_to_gguf.py;
`write_gguf` stands in for it here, offline, where a token is a byte.
"""

import argparse
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
from embedded_llama import embedded_llama
from torch import Tensor
from transformers import LlamaForCausalLM

import fxquant
from fxquant.demo import language_model as demo

PROMPT = "In the beginning "
NAMES = {  # of transformers' modules in a block, and of llama.cpp's tensors
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a Llama whose first tokens are bytes as a GGUF file.

    Args:
        model: its matrices are written in float32, or in bfloat16 if they are; tokens behind the
            first 256 get a number for a name.
        path: of the new file.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_bytes(writer, config.vocab_size)
    heads = {
        "attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads,
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        own = _own_name(name)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            _add_tensor(writer, own, in_order_of_file(tensor, heads.get(own.split(".")[-2], 0)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: Tensor) -> None:
    """Matrices of bfloat16 as they are, all else in float32."""
    if values.dtype != torch.bfloat16 or values.ndim == 1:
        writer.add_tensor(name, values.float().numpy())
        return
    kind = gguf.GGMLQuantizationType.BF16
    writer.add_tensor(name, values.contiguous().view(torch.uint8).numpy(), raw_dtype=kind)


def in_order_of_file(weight: Tensor, heads: int) -> Tensor:
    """The rows of `weight` [out, ...] as llama.cpp rotates them: of each head 0, n, 1, n + 1."""
    if not heads:
        return weight
    order = torch.arange(len(weight)).view(heads, 2, -1).transpose(1, 2).flatten()
    return weight[order]


def _own_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }  # fmt: skip
    if name in whole:
        return whole[name]
    _, _, number, *module, part = name.split(".")
    return f"blk.{number}.{NAMES['.'.join(module)]}.{part}"


def _add_bytes(writer: gguf.GGUFWriter, count: int) -> None:
    """A tokenizer whose first tokens are bytes; llama.cpp writes a space as another character."""
    tokens = [f"<0x{byte:02X}>" for byte in range(min(count, 256))]
    kinds = [gguf.TokenType.BYTE] * len(tokens)
    tokens += [f"token {number}" for number in range(len(tokens), count)]
    kinds += [gguf.TokenType.NORMAL] * (count - len(kinds))
    tokens[ord(" ")], kinds[ord(" ")] = "\u2581", gguf.TokenType.NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types(kinds)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_unk_token_id):
        add(0)


class LlamaCpp:
    """A GGUF file in llama.cpp, with keys and values in float32.

    Args:
        path: of the file.
        threads: how many compute.
    """

    def __init__(self, path: Path, threads: int = 1) -> None:
        self.model = llama_cpp.Llama(
            str(path), n_ctx=demo.CONTEXT, n_threads=threads, n_threads_batch=threads,
            n_gpu_layers=0, logits_all=True, verbose=False, type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
        )  # fmt: skip

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] of one sequence of `tokens` [tokens]."""
        self.model.reset()
        self.model.eval(tokens.tolist())
        return torch.from_numpy(np.array(self.model.scores[: len(tokens)]))

    def generate(self, prompt: str, count: int) -> bytes:
        """The likeliest `count` bytes after a text that llama.cpp tokenizes."""
        tokens = self.model.tokenize(prompt.encode(), add_bos=False)
        found = self.model.generate(tokens, temp=0.0)
        return bytes(next(found) for _ in range(count))


def main() -> None:
    """Quantize, export, and let llama.cpp continue a text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--bytes", type=int, default=96, help="how many to generate")
    arguments = parser.parse_args()
    model, heldout = embedded_llama(), demo.heldout_tokens()[0]
    batches = [{"input_ids": rows} for rows in demo.calibration_tokens()[::6].split(16)]
    graph, _ = fxquant.quantize(
        model, batches, target="gguf", group_size=32, method=arguments.method
    )
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        base, path = Path(folder) / "float.gguf", Path(folder) / "int4.gguf"
        write_gguf(model, base)
        fxquant.export(graph, path, format="gguf", base=base)
        run = LlamaCpp(path)
        found, ours = run.logits(heldout), graph(input_ids=heldout[None])["logits"][0]
        print(f"logits against fxquant's   {fxquant.sqnr_db(ours, found):.1f} dB")
        print(f"MB, float and INT4         {base.stat().st_size / 1e6:.2f}, "
              f"{path.stat().st_size / 1e6:.2f}")  # fmt: skip
        text = run.generate(PROMPT, arguments.bytes).decode(errors="replace")
        print(f"{PROMPT}{text}")


if __name__ == "__main__":
    main()
