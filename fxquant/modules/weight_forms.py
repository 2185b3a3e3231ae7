"""The one table of weights that can be quantized: `LayerForm`, a row for each kind of layer.

Every such weight is a matrix [rows, inputs] that is quantized along its inputs. A row says where
the matrix is, what multiplies it, and which layer holds its integers. Rounding, moments, decisions,
sizes, sensitivity, swapping, differences and pages know a kind of layer by its row alone.

| kind | float layer | matrix [rows, inputs] | blocks of rows | reads |
|---|---|---|---|---|
| linear | `nn.Linear` | weight [out, in] | 1 | x |
| embedding | `nn.Embedding` … | weight [entries, dim] | 1 | nothing: rows are looked up |
| experts | `GroupedLinear` | weight [experts · out, in] | experts | the rows routed to it |
| convolution | `nn.Conv1d` … | weight [out, in / groups · kernel] | groups | patches of x |
| transposed convolution | `nn.ConvTranspose1d` … | [out · kernel, in / groups] | groups | x |

A block of rows has inputs of its own, which the others do not see: an expert, or a group of a
convolution.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.modules.conv import (
    CONVOLUTIONS,
    TRANSPOSED,
    QuantizedConv,
    channels_at_places,
    matrix_of_convolution,
    outputs_at_patches,
    patches,
)
from fxquant.modules.embedding import QuantizedEmbedding
from fxquant.modules.embedding_bag import QuantizedEmbeddingBag
from fxquant.modules.grouped_linear import GroupedLinear, QuantizedGroupedLinear, split_by_expert
from fxquant.modules.layer import QuantizedLayer
from fxquant.modules.linear import QuantizedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.numerics.quantized_weight import QuantizedWeight

Reads = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class LayerForm:
    """How a kind of layer holds a weight that can be quantized, and uses it.

    Attributes:
        kind: a word for it.
        phrase: the same as a reason begins with it.
        layer: the class of the float layer, whose own code is `forward`.
        is_plain: whether an object of the class does no more than that.
        matrix: gives the weight as [rows, inputs]; nothing is copied where it lies so in memory.
        blocks: how many blocks of equally many rows have inputs of their own.
        reads: gives, of a layer and the arguments of a call, what each block multiplies,
            [tokens, inputs] or [..., inputs]; None where rows are looked up.
        gives: gives, of a layer, the output and the arguments of a call, the part of each block,
            in the order of `reads`: [tokens, rows] or [..., rows]; None where outputs of two runs
            cannot be compared token by token, since the model chooses which block a token goes to,
            or since several tokens add up to one output.
        bias: gives the bias, one number a row, or None; None where rows have no bias.
        block_word: what several blocks are called.
        is_routed: whether the model chooses which block a token goes to; otherwise all blocks see
            equally many tokens.
        scaled: gives, of a layer and a factor for each channel of its output (as many as a bias
            has), the weight that multiplies the output by it; None where no one weight does.
        outputs: gives, of a layer, how many these channels are, and how many dimensions an output
            has that has them in dimension 1.
        quantized: makes the quantized layer of a float one from its rows, its bias, and a layer
            that holds these rows already, or None.
    """

    kind: str
    phrase: str
    layer: type[nn.Module]
    matrix: Callable[[Any], Tensor]
    quantized: Callable[
        [Any, QuantizedWeight, Tensor | None, QuantizedLinear | None], QuantizedLayer
    ]
    reads: Reads | None
    gives: Reads | None
    bias: Callable[[Any], Tensor | None] | None = lambda layer: layer.bias
    blocks: Callable[[Any], int] = lambda layer: 1
    block_word: str = "blocks"
    is_routed: bool = False
    scaled: Callable[[Any, Tensor], Tensor] | None = None
    outputs: Callable[[Any], tuple[int, int]] | None = None
    is_plain: Callable[[Any], bool] = lambda layer: True

    @property
    def shares_input(self) -> bool:
        """Whether layers that read one value multiply the same tokens, whatever else they are."""
        return self.kind == "linear"

    @property
    def is_lookup(self) -> bool:
        """Whether the weight's rows are looked up instead of being multiplied."""
        return self.reads is None


def _linear(
    layer: nn.Linear, weight: QuantizedWeight, bias: Tensor | None, table: QuantizedLinear | None
) -> QuantizedLayer:
    if table is None:
        return linear_of(weight, bias, layer.weight.dtype)
    return table.with_bias(bias)


def _scaled(layer: Any, factor: Tensor) -> Tensor:
    """The weight [out, ...] with its rows multiplied by `factor` [out]."""
    scaled: Tensor = layer.weight * factor.view(-1, *(1,) * (layer.weight.ndim - 1))
    return scaled


def _scaled_transposed(layer: Any, factor: Tensor) -> Tensor:
    """The weight [in, out / groups, ...] with what gives an output multiplied by `factor` [out]."""
    grouped = layer.weight.unflatten(0, (layer.groups, -1))
    channels = factor.view(layer.groups, 1, -1, *(1,) * len(layer.kernel_size))
    return (grouped * channels).flatten(0, 1)


def _outputs(conv: Any) -> tuple[int, int]:
    return conv.out_channels, len(conv.kernel_size) + 2


def _convolution(layer: type[nn.Module]) -> LayerForm:
    return LayerForm(
        kind="convolution",
        phrase="Convolution",
        layer=layer,
        matrix=matrix_of_convolution,
        quantized=lambda conv, weight, bias, table: QuantizedConv.of(conv, weight, bias),
        reads=patches,
        gives=outputs_at_patches,
        blocks=lambda conv: conv.groups,
        block_word="groups",
        scaled=_scaled,
        outputs=_outputs,
    )


def _transposed(layer: type[nn.Module]) -> LayerForm:
    return LayerForm(
        kind="transposed convolution",
        phrase="Transposed convolution",
        layer=layer,
        matrix=matrix_of_convolution,
        quantized=lambda conv, weight, bias, table: QuantizedConv.of(conv, weight, conv.bias),
        reads=channels_at_places,
        gives=None,
        bias=None,  # it belongs to outputs, of which each is the sum of several rows
        blocks=lambda conv: conv.groups,
        block_word="groups",
        scaled=_scaled_transposed,
        outputs=_outputs,
    )


def _lookup(phrase: str, layer: type[nn.Module], made: type[QuantizedEmbedding]) -> LayerForm:
    return LayerForm(
        kind="embedding",
        phrase=phrase,
        layer=layer,
        matrix=lambda layer: layer.weight,
        quantized=lambda layer, weight, bias, table: made.of(layer, weight, table),
        reads=None,
        gives=None,
        bias=None,
        is_plain=lambda layer: layer.max_norm is None,  # else a lookup writes into the weight
    )


FORMS = (
    LayerForm(
        kind="linear",
        phrase="Linear layer",
        layer=nn.Linear,
        matrix=lambda layer: layer.weight,
        quantized=_linear,
        reads=lambda layer, x: [x],
        gives=lambda layer, output, x: [output],
        scaled=_scaled,
        outputs=lambda layer: (layer.out_features, 2),
    ),
    _lookup("Embedding", nn.Embedding, QuantizedEmbedding),
    _lookup("Embedding bag", nn.EmbeddingBag, QuantizedEmbeddingBag),
    LayerForm(
        kind="experts",
        phrase="Experts",
        layer=GroupedLinear,
        matrix=lambda layer: layer.weight.flatten(0, 1),
        quantized=lambda layer, weight, bias, table: QuantizedGroupedLinear.of(layer, weight, bias),
        reads=lambda layer, x, *routing: split_by_expert(layer.experts, x, *routing),
        gives=None,
        bias=lambda layer: None if layer.bias is None else layer.bias.flatten(),
        blocks=lambda layer: layer.experts,
        block_word="experts",
        is_routed=True,
    ),
    *(_convolution(layer) for layer in CONVOLUTIONS),
    *(_transposed(layer) for layer in TRANSPOSED),
)


def form_of(module: nn.Module) -> LayerForm | None:
    """The row of a float layer; None for other modules.

    A subclass has the row of its class where its code is the same. Hooks do not count: they run
    before and after the layer.
    """
    own = type(module)
    if own.__call__ is not nn.Module.__call__ or "forward" in vars(module):
        return None
    for form in FORMS:
        if isinstance(module, form.layer) and own.forward is form.layer.forward:
            weight = module._parameters.get("weight")
            return form if has_real_values(weight) and form.is_plain(module) else None
    return None


def has_real_values(weight: Tensor | None) -> bool:
    """Whether there is a weight of real numbers, and at least one of them."""
    return weight is not None and weight.is_floating_point() and weight.numel() > 0


def block_names(name: str, count: int) -> list[str]:
    """What the blocks of rows of a layer are called.

    >>> block_names("mlp.fc", 1), block_names("mlp.experts.down_proj", 2)
    (['mlp.fc'], ['mlp.experts.down_proj[0]', 'mlp.experts.down_proj[1]'])
    """
    return [name] if count == 1 else [f"{name}[{i}]" for i in range(count)]


def chosen_form(module: nn.Module) -> LayerForm:
    """The row of a float layer that was chosen because it has one."""
    form = form_of(module)
    assert form is not None
    return form


def matrix_of(module: nn.Module) -> Tensor:
    """The weight of a layer that has a form, as a matrix [rows, inputs] without gradient."""
    return chosen_form(module).matrix(module).detach()


def with_weight(module: nn.Module, weight: Tensor, arguments: tuple[Any, ...]) -> Tensor:
    """What a float layer without bias gives with another weight of the same shape."""
    changed: dict[str, Tensor] = {"weight": weight}
    bias = module._parameters.get("bias")
    if bias is not None:
        changed["bias"] = torch.zeros_like(bias)
    result: Tensor = torch.func.functional_call(module, changed, arguments)
    return result
