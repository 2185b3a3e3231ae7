"""What is quantized of mixtures of experts, and how well: models from configs, random weights.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive python benchmarks/experts.py
    OMP_WAIT_POLICY=passive python benchmarks/experts.py --model mixtral --method rtn

- `quantized`: of the weights that are factors of a product, heads apart, the share that is in
  integers; routers stay float.
- `times`: bytes of those layers' float weights over their bytes at 4 bits, with scales.
- `experts`, `dense`: mean SQNR in dB of what the layers of experts, and those of attention, give on
  held-out tokens, each for the input that it reads (what it introduces). `like them`: a dense layer
  of an expert's shape and random weights, rounded in the same way.
- `others`: the share of the tokens that are given other experts than in the float model.
- `output`: the SQNR of the logits. With random routers it is the changed experts that limit it.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from timing import report
from torch import nn
from torch.fx import GraphModule

import fxquant
from fxquant.graph.layers import sites

VOCABULARY, WIDTH, INNER, BATCHES, ROWS, TOKENS = 512, 256, 256, 16, 4, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": INNER,
    "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 2, "head_dim": 64,
                               "moe_intermediate_size": INNER}),
    "deepseek_v3": ("DeepseekV3", {
        "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": INNER, "num_key_value_heads": 4,
        "q_lora_rank": 128, "kv_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 64,
    }),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 64}),
    "granite_moe": ("GraniteMoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "jetmoe": ("JetMoe", {"num_local_experts": 8, "num_experts_per_tok": 2,
                          "num_attention_heads": 4, "kv_channels": 64}),
}  # fmt: skip
GROUP = 128


def built(name: str) -> nn.Module:
    """A seeded causal language model."""
    class_name, more = MODELS[name]
    torch.manual_seed(0)
    config = getattr(hf, f"{class_name}Config")(**{**SIZES, **more})
    config.use_cache = False
    model: nn.Module = getattr(hf, f"{class_name}ForCausalLM")(config)
    return model.eval()


def tokens() -> list[dict[str, torch.Tensor]]:
    """Batches of random tokens."""
    drawn = torch.Generator().manual_seed(0)
    shape = (BATCHES, ROWS, TOKENS)
    ids = torch.randint(VOCABULARY, shape, generator=drawn)
    return [{"input_ids": batch} for batch in ids]


def mean(values: list[float]) -> float:
    """The mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def dense_db(method: str) -> float:
    """The SQNR of a dense layer of an expert's shape, alone."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(WIDTH, INNER, bias=False)).eval()
    batches = list(torch.randn(BATCHES, ROWS * TOKENS, WIDTH))
    options = {"method": method, "group_size": GROUP, "skip_param_threshold": 0}
    _, info = fxquant.quantize(layer, batches, accuracy_warning="ignore", **options)
    return float(info.rows[0].introduced_sqnr_db or 0)


def row_of(name: str, method: str) -> dict[str, Any]:
    """A row of the table."""
    graph, info = fxquant.quantize(
        built(name), tokens(), method=method, group_size=GROUP, skip_param_threshold=0,
        accuracy_warning="ignore",
    )  # fmt: skip
    products = [d for d in info.decisions if d.product is not None and d.module != "lm_head"]
    total = sum(d.weight_elements for d in products)
    packed = [d for d in products if d.bits is not None]
    layers = {n: m for n, m in named_layers(graph) if n in {d.module for d in packed}}
    held = sum(b.numel() * b.element_size() for m in layers.values() for b in stored(m))
    kinds = {d.module: d.product for d in packed}
    found: dict[bool, list[float]] = {True: [], False: []}
    for row in info.rows:
        if row.introduced_sqnr_db is not None:
            found[kinds[row.module] == "expert"].append(row.introduced_sqnr_db)
    return {
        "model": name,
        "quantized": sum(d.weight_elements for d in packed) / total,
        "times": 4 * sum(d.weight_elements for d in packed) / held,
        "experts": mean(found[True]),
        "dense": mean(found[False]),
        "like them": dense_db(method),
        "others": mean(list(info.changed_experts.values())),
        "output": info.sqnr_db or 0.0,
    }


def named_layers(graph: GraphModule) -> list[tuple[str, nn.Module]]:
    """The quantized layers by the model's names."""
    return [(site.name, site.module) for site in sites(graph)]


def stored(layer: nn.Module) -> list[torch.Tensor]:
    """What a file holds of a layer."""
    return list(layer.state_dict().values())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    rows = [row_of(name, arguments.method) for name in arguments.model]
    report(f"experts at 4 bits, groups of {GROUP}, {arguments.method}", rows, arguments.json)


if __name__ == "__main__":
    main()
