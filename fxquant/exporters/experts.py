"""Which parameters of a model of transformers are the matrices of a mixture's experts.

A traced graph shows what a parameter is multiplied with. Here there are no weights yet, and no
graph: the library's own marks say it. Its experts' classes tell whether matrices are stored
[experts, out, in] or [experts, in, out]; classes that hold one parameter `weight` store the first.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from fxquant.modules.grouped_linear import GroupedLinear

COUNT, ORDER = "num_experts", "is_transposed"
ONLY = "weight"  # a parameter of this name has no other one beside it


@dataclass(frozen=True)
class ExpertsParameter:
    """A parameter [experts, out, in], or [experts, in, out].

    Attributes:
        name: of the layer that multiplies by it, as in a traced graph.
        is_transposed: whether it is [experts, in, out].
    """

    name: str
    is_transposed: bool

    def layer_on(self, value: Tensor) -> GroupedLinear:
        """The float layer on values of the parameter."""
        return GroupedLinear.on(value.mT if self.is_transposed else value)


def experts_parameters(model: nn.Module) -> dict[str, ExpertsParameter]:
    """The parameters of experts in `model`, by their names."""
    found = {}
    for path, part in model.named_modules():
        for key, parameter in part.named_parameters(recurse=False):
            order = getattr(part, ORDER, False if key == ONLY else None)
            is_of_experts = parameter.ndim == 3 and len(parameter) == getattr(part, COUNT, None)
            if is_of_experts and isinstance(order, bool):
                name = path if key == ONLY else f"{path}.{key}"
                found[f"{path}.{key}"] = ExpertsParameter(name, order)
    return found
