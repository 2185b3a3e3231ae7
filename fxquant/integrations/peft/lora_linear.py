"""LoRA on a quantized linear layer: trained beside its integers, merged by rounding again."""

import warnings
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from fxquant.algorithms.requantize import requantize
from fxquant.errors import OptionError
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of

# Of `init_lora_weights`: those that leave the base weight as it is.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
WORTH_A_WARNING = 0.1  # of an adapter's update, by norm


class MergeLossWarning(UserWarning):
    """Rounding took a part of an adapter's update away."""


class QuantizedLoraLinear(Linear):
    """PEFT's adapter of a linear layer, on a quantized one.

    The forward is PEFT's. To merge, the sum of the dequantized weight and the update is rounded
    again in the layer's own form; the layer without adapters is kept, and unmerging puts it back.

    Attributes:
        base_layer: the quantized layer, rounded with the adapters' updates while merged.
        merge_loss: while merged: how much of the updates rounding took away, by norm, 0 or more.

    Args:
        base_layer: the quantized layer.
        adapter_name: of the first adapter.
        config: of the adapter.
        **kwargs: what PEFT passes to its own layer.

    Raises:
        OptionError: the config asks for a variant of LoRA that changes the base weight or reads
            its values in each call.
    """

    base_layer: QuantizedLinear

    def __init__(
        self, base_layer: QuantizedLinear, adapter_name: str, config: LoraConfig, **kwargs: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.fan_in_fan_out = False  # whatever the layout of the float layer was
        self.merge_loss = 0.0
        self._name = kwargs.get("target_name", "a layer")
        self._without_adapters: list[QuantizedLinear] = []  # one while merged; no submodule

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    @property
    def lora_variants(self) -> dict[tuple[str, ...], None]:
        """Plain LoRA alone."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        """Refuse variants of LoRA.

        Raises:
            OptionError: the config asks for one.
        """
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            raise OptionError(
                "LoraConfig",
                found=f"that PEFT refused it: {error}",
                needed="plain LoRA on quantized layers",
                remedy="Leave variants such as use_dora=True out, or target float layers.",
            ) from error

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter, as PEFT does.

        Raises:
            OptionError: it would be initialized from the base weight, which is then changed.
        """
        if config.init_lora_weights not in INITIALIZATIONS:
            raise OptionError(
                "LoraConfig.init_lora_weights",
                found=repr(config.init_lora_weights),
                needed=f"one of {', '.join(map(repr, INITIALIZATIONS))} on quantized layers",
                remedy="Others change the base weight: initialize and quantize the float model "
                "first, or leave init_lora_weights out.",
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Let the base layer become one that was rounded with the adapters' updates.

        Args:
            safe_merge: has no effect: a weight that is not finite is never merged.
            adapter_names: the active ones by default.

        Raises:
            WeightError: the sum is not finite.
            OptionError: an adapter has a bias and the base layer none, or has hooks.

        Warns:
            MergeLossWarning: a tenth of the update or more, by norm, is lost in rounding.
        """
        new = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not new:
            return
        names = [*self.merged_adapters, *new]
        base = self._without_adapters[0] if self.merged else self.base_layer
        self._check_mergeable(base, names)
        update = sum((self.get_delta_weight(n).float() for n in names), torch.zeros(()))
        weight = base.dequantize() + update
        rounded = requantize(weight, base.quantized_weight)
        made = linear_of(rounded, self._merged_bias(base, names), base.weight.dtype)
        made.activation = base.activation
        made.train(base.training)
        size = float(update.norm())
        self.merge_loss = float((made.dequantize() - weight).norm()) / size if size else 0.0
        if self.merge_loss >= WORTH_A_WARNING:  # in one text for all layers of a width
            warnings.warn(
                f"Adapters were merged into a layer of {made.bits} bits, and a tenth or more of "
                "their update was lost in rounding; `merge_loss` of each merged layer is the "
                "share. Unmerged, all of it counts.",
                MergeLossWarning,
                stacklevel=2,
            )
        self._without_adapters = [base]
        self.base_layer = made  # an object of its own: others may share the packed weight
        self.merged_adapters.extend(new)

    def unmerge(self) -> None:
        """Put the layer without adapters back, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer = self._without_adapters.pop()
        self.merged_adapters.clear()
        self.merge_loss = 0.0

    def _check_mergeable(self, base: QuantizedLinear, names: list[str]) -> None:
        if base.bias is None and any(self.lora_bias[name] for name in names):
            raise OptionError(
                self._name,
                found="an adapter with a bias on a layer without",
                needed="a layer that has a bias",
                remedy="Keep the adapter unmerged, or train it without lora_bias=True.",
            )
        if base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base):
            raise OptionError(
                self._name,
                found="hooks or code of its own on the quantized layer",
                needed="a layer that another one can replace",
                remedy="Remove them first, or keep the adapter unmerged.",
            )

    def _merged_bias(self, base: QuantizedLinear, names: list[str]) -> Tensor | None:
        bias = base.bias
        for name in names:
            if self.lora_bias[name]:
                assert bias is not None  # it was checked
                added = self.lora_B[name].bias * self.scaling[name]
                bias = bias + added.to(bias.dtype)
        return bias

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Move the layer without adapters along."""
        for layer in self._without_adapters:
            layer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def __repr__(self) -> str:
        return "fxquant." + super().__repr__()
