"""What PEFT makes of a model with quantized layers and a `LoraConfig`."""

from collections.abc import Iterator
from typing import Any

from peft import LoraConfig
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from fxquant.errors import OptionError
from fxquant.integrations.peft.lora_linear import QuantizedLoraLinear
from fxquant.modules.layer import QuantizedLayer, has_quantized_layer
from fxquant.modules.linear import QuantizedLinear
from fxquant.serialization.model_layers import quantized_layers


class QuantizedLoraModel(LoraModel):
    """PEFT's LoRA, which adapts quantized linear layers too.

    What PEFT would leave untrained without a word, since integers have no gradient, is refused:
    `modules_to_save` and `trainable_token_indices` on quantized layers, and `bias="all"`.
    """

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        """Check the config and resolve "all-linear", before PEFT changes the model.

        A tied head is the same object as its embedding's table, where PEFT would pass it over: if
        it is a target, it becomes an object of its own on the same packed weight.

        Raises:
            OptionError: the config asks for the training of what is quantized.
        """
        super()._prepare_model(peft_config, model)
        _check_trainable(peft_config, model)
        targets = peft_config.target_modules
        if isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
            _maybe_include_all_linear_layers(peft_config, model)
            peft_config.target_modules |= set(_quantized_linears(model))
        seen: set[nn.Module] = set()
        for name, layer in list(model.named_modules(remove_duplicate=False)):
            is_shared = layer in seen and isinstance(layer, QuantizedLinear)
            if is_shared and self._check_target_module_exists(peft_config, name):
                model.set_submodule(name, layer.with_bias(layer.bias))
            seen.add(layer)

    @staticmethod
    def _create_new_module(
        lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> nn.Module:
        if isinstance(target, QuantizedLinear):
            return QuantizedLoraLinear(target, adapter_name, config=lora_config, **kwargs)
        if isinstance(target, QuantizedLayer):
            raise OptionError(
                "LoraConfig.target_modules",
                found=f"{kwargs.get('target_name')}, a {type(target).__name__}",
                needed="linear layers, quantized or float, or float layers of other kinds",
                remedy="Leave it out of target_modules, or quantize again with it in "
                "modules_to_not_convert, or, if it is a RoundedInput, with observer='dynamic'.",
            )
        return LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs)


def _quantized_linears(model: nn.Module) -> Iterator[str]:
    """The names that "all-linear" means, as PEFT has it for float layers: all but the head."""
    own_head = getattr(model, "get_output_embeddings", None)
    head = own_head() if own_head is not None else None
    adapted = {layer.base_layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in quantized_layers(model):
        if isinstance(layer, QuantizedLinear) and layer is not head and layer not in adapted:
            yield name


def _check_trainable(config: LoraConfig, model: nn.Module) -> None:
    to_save = tuple(config.modules_to_save or ())
    for name, part in model.named_modules():
        if to_save and name.endswith(to_save) and has_quantized_layer(part):
            raise OptionError(
                "LoraConfig.modules_to_save",
                found=f"{name}, which is quantized: it would stay as it is",
                needed="float modules",
                remedy=f"Quantize again with modules_to_not_convert=[{name!r}], or target it.",
            )
    layers = [layer for _, layer in quantized_layers(model)]
    if config.bias != "none" and any(layer.bias is not None for layer in layers):
        raise OptionError(
            "LoraConfig.bias",
            found=f"{config.bias!r}; the biases of quantized layers are not trained",
            needed="'none'",
            remedy="Leave it out; lora_bias=True trains a bias of the adapter's own.",
        )
    is_lookup = any(not isinstance(layer, QuantizedLinear) for layer in layers)
    if config.trainable_token_indices is not None and is_lookup:
        raise OptionError(
            "LoraConfig.trainable_token_indices",
            found="a quantized embedding, whose rows would stay as they are",
            needed="a float embedding",
            remedy="Quantize again without embeddings=.",
        )
