"""INT4 weights of group 128 as other libraries make them.

    pip install nncf torchao hqq optimum-quanto bitsandbytes
    pip install llmcompressor  # for `gptq`; needs an older transformers than the tests

Whichever is installed takes part. All of them are given the same weights. For accuracy, what they
make of them is read back as floats and put into a copy of the float model, so that kernels play no
role.
"""

import copy
import importlib.util
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
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


def installed_peers() -> dict[str, Callable[[nn.Module, Iterable[str], list[Any]], nn.Module]]:
    """By name: what makes a quantized copy from a model, names of layers and batches."""
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
    return found


def missing_peers() -> list[str]:
    """The names of those that are not installed."""
    return [name for name in ("nncf", "torchao", "hqq", "optimum.quanto") if not _has(name)]


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


def _nncf(*, is_symmetric: bool) -> Any:
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
            dataset=nncf.Dataset(batches[:1]),  # traces the model
        )

    return make
