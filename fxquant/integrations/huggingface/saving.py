"""What a folder holds of a model with quantized layers."""

from typing import Any

from torch import Tensor, nn

from fxquant.serialization.model_layers import describe_layers, quantized_layers


def described_state(model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description of the quantized layers, and the tensors of the whole model by name.

    Raises:
        SaveError: a layer cannot be described.
    """
    layers, tensors = describe_layers(model)
    inside = tuple(f"{name}." for name, _ in quantized_layers(model))
    floats = {k: v for k, v in model.state_dict().items() if not k.startswith(inside)}
    return layers, {**floats, **tensors}
