"""INT4 weights of group 128 as other libraries make them.

    pip install nncf torchao hqq optimum-quanto auto-round bitsandbytes
    pip install llmcompressor  # for `gptq`; needs an older transformers than the tests

Whichever is installed takes part. All of them are given the same weights, and those that take data
the same batches. For accuracy, what they make of the weights is read back as floats, or runs in
their own layers on float activations, so that kernels play no role.
"""

import copy
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 128
RoundWeight = Callable[[nn.Linear], Any]  # to whatever the library keeps of a weight


def rounding_peers() -> dict[str, RoundWeight]:
    """By name: what rounds the weight of one layer, without data."""
    peers = {"torchao": _torchao, "hqq": _hqq, "optimum.quanto": _quanto, "bitsandbytes": _nf4}
    return {name: peer for name, peer in peers.items() if _has(name)}


def gptq_peers() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """By name: a weight [out, in] and the mean of x xᵀ [in, in] to a rounded weight."""
    return {"llm-compressor": _llm_compressor_gptq} if _has("llmcompressor") else {}


def installed_peers(
    model: nn.Module,
) -> dict[str, Callable[[nn.Module, Iterable[str], list[Any]], nn.Module]]:
    """By name: what makes a quantized copy from a model like this, names of layers and batches."""
    found: dict[str, Any] = {}
    if _has("torchao"):
        found["torchao, symmetric"] = _by_weight(_torchao)
    if _has("hqq"):
        found["hqq (package)"] = _by_weight(_hqq)
    if _has("optimum.quanto"):
        found["optimum-quanto"] = _by_weight(_quanto)
    if _has("nncf"):
        found["nncf, symmetric"] = _nncf(is_symmetric=True)
        found["nncf, asymmetric"] = _nncf(is_symmetric=False)
        found["nncf, data-aware"] = _nncf(is_symmetric=True, is_data_aware=True)
        found["nncf, data-aware, asymmetric"] = _nncf(is_symmetric=False, is_data_aware=True)
    if _has("auto_round") and hasattr(model, "config"):  # it takes models of transformers alone
        found["auto-round"] = _auto_round
    return found


def missing_peers() -> list[str]:
    """The names of those that are not installed."""
    names = ("nncf", "torchao", "hqq", "optimum.quanto", "auto_round")
    return [name for name in names if not _has(name)]


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def _by_weight(round_weight: RoundWeight) -> Any:
    @torch.no_grad()
    def make(model: nn.Module, names: Iterable[str], batches: list[Any]) -> nn.Module:
        rounded = copy.deepcopy(model)
        for name in names:
            linear: Any = rounded.get_submodule(name)
            linear.weight.copy_(round_weight(linear).dequantize())
        return rounded

    return make


def _torchao(linear: nn.Linear) -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    holder = nn.Sequential(copy.deepcopy(linear))
    quantize_(holder, IntxWeightOnlyConfig(torch.int4, PerGroup(GROUP)))
    return holder[0].weight


def _hqq(linear: nn.Linear) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=GROUP, axis=1)
    return HQQLinear(copy.deepcopy(linear), config, compute_dtype=torch.float32, device="cpu")


def _quanto(linear: nn.Linear) -> Any:
    from optimum.quanto import freeze, qint4, quantize

    holder = nn.Sequential(copy.deepcopy(linear))
    quantize(holder, weights=qint4)
    freeze(holder)
    return holder[0].weight


def _nf4(linear: nn.Linear) -> Any:
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(linear.weight.detach(), blocksize=GROUP, quant_type="nf4")


def _llm_compressor_gptq(weight: Tensor, second: Tensor) -> Tensor:
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight

    arguments = QuantizationArgs(num_bits=4, group_size=GROUP, strategy="group", actorder="weight")
    largest = weight.unflatten(1, (-1, GROUP)).abs().amax(-1)
    scale = (largest / 7.5)[None]
    # It works in place on what it is given.
    rounded, _, _ = quantize_weight(
        weight.clone()[None],
        second.clone()[None],
        scale,
        torch.zeros_like(scale),
        None,
        arguments,
    )
    return rounded[0]


def _nncf(*, is_symmetric: bool, is_data_aware: bool = False) -> Any:
    """Without data, or with what it offers for torch: AWQ and scales estimated from the data."""

    def make(model: nn.Module, names: Iterable[str], batches: list[Any]) -> nn.Module:
        import nncf

        mode = nncf.CompressWeightsMode
        kept = [n for n, m in model.named_modules() if hasattr(m, "weight") and n not in set(names)]
        patterns = [f"{re.escape(name.replace('.', '/'))}/.*" for name in kept]
        return nncf.compress_weights(
            copy.deepcopy(model),
            mode=mode.INT4_SYM if is_symmetric else mode.INT4_ASYM,
            group_size=GROUP,
            all_layers=True,
            ignored_scope=nncf.IgnoredScope(patterns=patterns, validate=False),
            dataset=nncf.Dataset(batches if is_data_aware else batches[:1]),  # traces the model
            awq=is_data_aware,
            scale_estimation=is_data_aware,
        )

    return make


def _auto_round(model: nn.Module, names: Iterable[str], batches: list[Any]) -> nn.Module:
    """Its light recipe, symmetric: 50 steps of signed gradients for each block, not 200.

    It quantizes the linear layers of the list of blocks, and takes rows of one length, 8 at a time.
    """
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    longest = max(batch["input_ids"].shape[1] for batch in batches)
    padded = [
        {name: F.pad(ids[i : i + 8], (0, longest - ids.shape[1])) for name, ids in batch.items()}
        for batch in batches
        for i in range(0, len(batch["input_ids"]), 8)
    ]
    given: Any = copy.deepcopy(model)
    rounding: Any = AutoRound(
        given,
        AutoTokenizer.from_pretrained(given.name_or_path),
        scheme="W4A16",
        dataset=padded,
        nsamples=sum(len(batch["input_ids"]) for batch in padded),
        batch_size=8,
        seqlen=longest,
        iters=50,
        lr=5e-3,
        device_map="cpu",
        enable_torch_compile=False,
    )
    rounded, chosen = rounding.quantize()
    missed = {name for name in names if chosen.get(name, {}).get("bits") != 4}
    if missed:
        raise RuntimeError(f"AutoRound left layers float: {sorted(missed)}")
    return rounded  # with rounded weights in float layers
