"""Layers quantized while a library loads a float folder, weight by weight.

As soon as a weight is read it is rounded, and forgotten: the float model is never in memory as a
whole. Weights are rounded alone, as in `quantize_checkpoint`: nothing is known of their inputs.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from fxquant.config.method import parse_method
from fxquant.config.quant_config import QuantConfig
from fxquant.errors import FxquantError, OptionError
from fxquant.exporters.experts import ExpertsParameter
from fxquant.integrations.huggingface.empty_layer import (
    INITIALIZED,
    become,
    empty,
    tied_weights,
    untie,
)
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.packed_parameter import PackedParameter, child_name, hand_over
from fxquant.passes.decide import decide, why_float
from fxquant.passes.layer_maker import naming
from fxquant.passes.quantize_activations import quantize_activations_dynamically
from fxquant.passes.rewrite import share_tables
from fxquant.passes.rounded_layers import RoundedLayers
from fxquant.tracing.opaque import graph_of_layers

WEIGHT = ".weight"


class RoundedOnLoading:
    """Quantizes the layers of a model that is being loaded.

    Args:
        config: which layers, and how.

    Raises:
        OptionError: the method needs data.
    """

    def __init__(self, config: QuantConfig) -> None:
        self.config = config
        self.rounding = parse_method(config.method, has_data=False).rounding
        self._bits: dict[str, int] = {}
        self._experts: dict[str, ExpertsParameter] = {}
        self._tied: dict[str, list[str]] = {}
        self._made: dict[str, QuantizedLayer] = {}
        self._failed: FxquantError | None = None

    def prepare(
        self, model: nn.Module, experts: Mapping[str, ExpertsParameter] | None = None
    ) -> None:
        """Decide about the layers of `model`, which has no weights yet.

        Args:
            model: of the library.
            experts: parameters that are the matrices of experts, by name, as far as it says so.

        Raises:
            RuleError: a rule of the config selects nothing.
            OptionError: the config leaves every layer float.
        """
        _tie(model)
        experts = experts or {}
        more = {e.name: e.layer_on(model.get_parameter(p)) for p, e in experts.items()}
        decisions = decide(graph_of_layers(model, more), self.config)
        self._bits = {d.module: d.bits for d in decisions if d.bits is not None}
        self._experts = {p: e for p, e in experts.items() if e.name in self._bits}
        if not self._bits:
            raise OptionError(
                "FxquantConfig",
                found=f"rules that leave every layer float ({why_float(decisions)})",
                needed="a layer that is quantized",
                remedy="Skip fewer layers, or load the model without a quantization_config.",
            )
        self._tied = _tied_layers(model)
        looked_up = [n for n in self._layers() if isinstance(model.get_submodule(n), nn.Embedding)]
        untie(model, looked_up)

    def _layers(self) -> list[str]:
        """The chosen layers that are modules."""
        experts = {e.name for e in self._experts.values()}
        return [name for name in self._bits if name not in experts]

    def wants(self, parameter: str) -> bool:
        """Whether a parameter of that name is the weight of a chosen layer."""
        is_weight = parameter.endswith(WEIGHT) and parameter.removesuffix(WEIGHT) in self._bits
        return is_weight or parameter in self._experts

    def tied_to(self, parameter: str) -> list[str]:
        """The weights that are one with the weight of a chosen layer, itself among them."""
        if parameter in self._experts:
            return [parameter]
        name = parameter.removesuffix(WEIGHT)
        return [member + WEIGHT for member in self._tied.get(name, [name])]

    def round(self, model: nn.Module, parameter: str, weight: Tensor) -> dict[str, Tensor]:
        """Quantize the layer of a loaded weight, and the layers that are tied to it.

        Returns:
            What stays float, by name: the weight of a tied layer that was not chosen.
        """
        layers = RoundedLayers(self.config, self.rounding)
        if parameter in self._experts:
            with self._keeping_errors():
                self._round_experts(model, parameter, weight, layers)
            return {}
        name = parameter.removesuffix(WEIGHT)
        together = self._tied.get(name, [name])
        shared = nn.Parameter(weight, requires_grad=False)
        for member in (m for m in together if m in self._bits):
            with self._keeping_errors():
                self._round(model, member, shared, layers)
        return {m + WEIGHT: weight for m in together if m not in self._bits}

    @contextmanager
    def _keeping_errors(self) -> Iterator[None]:
        """Keep an error for the end: the library might make another one of it."""
        try:
            yield
        except FxquantError as error:
            self._failed = self._failed or error

    def _round_experts(
        self, model: nn.Module, parameter: str, weight: Tensor, layers: RoundedLayers
    ) -> None:
        experts = self._experts[parameter]
        with naming(experts.name):
            made = layers.quantize(experts.name, experts.layer_on(weight), self._bits[experts.name])
        place = hand_over(model, parameter)
        self._made[child_name(parameter)] = PackedParameter.of(made, experts.is_transposed)
        empty(place)

    def _round(
        self, model: nn.Module, name: str, weight: nn.Parameter, layers: RoundedLayers
    ) -> None:
        place = model.get_submodule(name)
        layer = copy.copy(place)
        layer._parameters = {**place._parameters, "weight": weight}
        if "bias" in layer._parameters:
            layer._parameters["bias"] = None
        with naming(name):
            self._made[name] = layers.quantize(name, layer, self._bits[name])
        bias = place._parameters.get("bias")
        made = empty(place)
        if bias is not None:
            vars(made).pop("bias")
            made.register_parameter("bias", bias)

    def finish(self, model: nn.Module) -> None:
        """Put the quantized layers into the model.

        Layers whose weight the folder lacks stay float, as the library has initialized them.

        Raises:
            FxquantError: a weight could not be quantized.
        """
        for parameter in (*(n + WEIGHT for n in self._layers()), *self._experts):
            owner, _, key = parameter.rpartition(".")
            weight = model.get_submodule(owner)._parameters.get(key)
            if weight is not None and getattr(weight, INITIALIZED, False):
                self.round(model, parameter, weight.detach())
        if self._failed is not None:
            raise self._failed
        for name, layer in self._made.items():
            place = model.get_submodule(name)
            bias = place._parameters.pop("bias", None)
            if bias is not None:
                layer.bias = bias.detach().clone()  # a tied bias is a parameter elsewhere
            become(place, layer)
        share_tables(model)
        if self.config.activation_bits is not None:
            quantize_activations_dynamically(model)


def _tie(model: nn.Module) -> None:
    """Tie the parameters that will be tied when the model is loaded."""
    for target, source in tied_weights(model).items():
        owner, _, name = target.rpartition(".")
        setattr(model.get_submodule(owner), name, model.get_parameter(source))


def _tied_layers(model: nn.Module) -> dict[str, list[str]]:
    """For each layer whose weight is tied, all that have the same one."""
    groups: dict[str, list[str]] = {}
    for target, source in tied_weights(model).items():
        if target.endswith(WEIGHT) and source.endswith(WEIGHT):
            names = (source.removesuffix(WEIGHT), target.removesuffix(WEIGHT))
            group = groups.setdefault(names[0], [names[0]])
            group.append(names[1])
            groups[names[1]] = group
    return groups
