"""A layer of what was stored, and putting it in the place of the float one."""

import warnings

import torch
from torch import Tensor, nn

from fxquant.errors import LoadError, caller_level, near_misses
from fxquant.exporters.stored_layer import StoredLayer
from fxquant.exporters.stored_names import StoredParameter
from fxquant.graph.layers import is_plain_linear
from fxquant.modules.grouped_linear import GroupedLinear, QuantizedGroupedLinear
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.modules.packed_parameter import PackedParameter, child_name, hand_over
from fxquant.numerics.integers import unsigned
from fxquant.numerics.metrics import sqnr_db
from fxquant.numerics.quantized_weight import SCALE_DTYPE, QuantizedWeight


class RoundedScalesWarning(UserWarning):
    """Scales in a checkpoint have more digits than our layers store."""


def layer_of(
    name: str, stored: StoredLayer, bias: Tensor | None, rounded: dict[str, float]
) -> QuantizedLinear:
    """The layer that holds what was stored; notes how close it is where scales were rounded.

    Args:
        name: of the layer.
        stored: what the files hold of it.
        bias: [out] or None.
        rounded: gets the SQNR of the weight in dB, by the layer's name, where a scale was rounded.

    Raises:
        LoadError: a scale is no number to divide by.
    """
    scales = stored.scales.to(SCALE_DTYPE).float()
    if not bool((torch.isfinite(scales) & (scales != 0)).all()):
        raise LoadError(
            name,
            found="a scale that is 0, NaN or Inf",
            needed="finite scales other than 0",
            remedy="Make the checkpoint again: such a group of weights carries nothing.",
        )
    middle = unsigned(stored.bits).middle
    is_symmetric = bool((stored.zero_points == middle).all())
    q = stored.q.to(torch.uint8).contiguous()
    grid = scales.contiguous(), stored.zero_points.contiguous()
    weight = QuantizedWeight.from_integers(
        q, *grid, bits=stored.bits, group_size=stored.group_size, symmetric=is_symmetric
    )
    if not torch.equal(scales, stored.scales):
        rounded[name] = sqnr_db(stored.weight(), weight.dequantize())
    return linear_of(weight, bias)


def put_layer(model: nn.Module, name: str, layer: QuantizedLinear) -> None:
    """Put the layer in the place of the float one of that name.

    Raises:
        LoadError: there is no Linear layer of this shape.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    linear = modules.get(name)
    if linear is None or not is_plain_linear(linear):
        found = "no module of that name" if linear is None else f"a {type(linear).__name__}"
        close = near_misses(name, [n for n, m in modules.items() if is_plain_linear(m)], count=1)
        raise LoadError(
            name,
            found=f"{found} in the model",
            needed="a Linear layer for each quantized one of the folder",
            remedy=f"Pass a model of the class whose checkpoint it is; it has {close}.",
        )
    shape = (linear.out_features, linear.in_features)
    if shape != (layer.out_features, layer.in_features):
        raise LoadError(
            name,
            found=f"a weight of {layer.out_features} x {layer.in_features}",
            needed=f"one of {shape[0]} x {shape[1]}",
            remedy="Pass a model of the configuration whose checkpoint it is.",
        )
    model.set_submodule(name, layer.to(linear.weight.dtype).eval())


def put_experts(
    model: nn.Module, stored: StoredParameter, layers: dict[str, QuantizedLinear]
) -> None:
    """Put matrices that a folder has one by one into the parameter that they make up.

    Args:
        model: is changed; the code of its experts stays.
        stored: of the parameter.
        layers: by the names of the tensors that hold their weights.

    Raises:
        LoadError: the parameter is not [experts, out, in], or some matrices are missing, or they
            are quantized in different ways.
    """
    parameter = model.get_parameter(stored.name)
    shapes = {name: layer.weight_shape for name, layer in layers.items()}
    is_whole = layers.keys() == stored.tensors.keys()
    rows = stored.rows(lambda name: shapes[name]) if is_whole else None
    weights = [layer.quantized_weight for layer in layers.values()]
    forms = {(w.bits, w.group_size, w.in_features, w.symmetric) for w in weights}
    count = sum(shape[0] for shape in shapes.values())
    is_fitting = parameter.ndim == 3 and count == parameter.shape[0] * parameter.shape[1]
    if rows is None or len(forms) > 1 or not is_fitting:
        raise LoadError(
            stored.name,
            found=f"{len(layers)} quantized matrices in {len(forms)} forms, {count} rows in all",
            needed=f"all {len(stored.tensors)} matrices of a parameter "
            f"{list(parameter.shape)} in one form, row by row",
            remedy="Pass a model of the class and configuration whose checkpoint it is.",
        )
    order = torch.cat([rows[name] for name in layers]).argsort()
    weight = QuantizedWeight.joined(weights).rows(order)
    layer = QuantizedGroupedLinear.of(GroupedLinear.on(parameter), weight, None)
    hand_over(model, stored.name)
    model.set_submodule(child_name(stored.name), PackedParameter.of(layer, False))


def warn_of_rounded(rounded: dict[str, float]) -> None:
    """Say how close the weights are whose scales were rounded, if there are any."""
    if rounded:
        worst = min(rounded, key=rounded.__getitem__)
        text = f"{len(rounded)} layers have scales with more digits than bfloat16, which were "
        text += f"rounded: the weights of {worst} are equal to {rounded[worst]:.0f} dB"
        warnings.warn(text, RoundedScalesWarning, caller_level())
