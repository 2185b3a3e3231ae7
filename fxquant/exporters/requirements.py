"""What several formats ask of a layer, each as findings."""

import os
from collections.abc import Iterator, Mapping

import torch

from fxquant.config.targets import Target
from fxquant.errors import OptionError
from fxquant.exporters.findings import Finding
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.exporters.source import Source

# Layers that vLLM runs as one product, so that their schemes must be the same.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


Base = str | os.PathLike[str]


def given_base(base: Base | None, needed: str, remedy: str) -> Base:
    """The float model's own file or folder, without which the format cannot be written.

    Raises:
        OptionError: it is None.
    """
    if base is None:
        raise OptionError("base", found="nothing", needed=needed, remedy=remedy)
    return base


def float_activations(source: Source) -> Iterator[Finding]:
    """The format holds weights: activations would not be quantized where it runs."""
    if source.has_static_activations:
        problem = "the format has no static ranges of activations"
        yield Finding("activations", problem, "Quantize without activation_bits.")
    yield from float_inside_layers(source)


def float_inside_layers(source: Source) -> Iterator[Finding]:
    """No layer rounds its input itself: runtimes that do, do it in their own way."""
    if source.has_dynamic_products:
        problem = "the format has no products of activations whose ranges are found while it runs"
        yield Finding("products of activations", problem, "Quantize without activation_products.")
    for name, layer in source.layers.items():
        if layer.activation != "float":
            problem = "the format has no int8 activations whose ranges are found while it runs"
            yield Finding(name, problem, "Quantize without activation_bits.")


def linear_layers_only(source: Source, target: Target) -> Iterator[Finding]:
    """No embedding, convolution or fused expert is quantized: the format has no form for them."""
    for name in source.other_layers:
        problem = "the format holds quantized Linear layers only"
        yield Finding(name, problem, within(target))


def holdable(name: str, layer: IntegerLayer | None, target: Target) -> Iterator[Finding]:
    """The format holds such a layer: its kind, its width, its shape cut into groups."""
    if layer is None:
        remedy = "Leave it float with modules_to_not_convert."
        yield Finding(name, "the format has no layers of this kind", remedy)
        return
    if layer.code_book is not None:
        problem = f"it has the levels of the code book {layer.code_book}: the format has integers"
        yield Finding(name, problem, "Quantize without code_book.")
        return
    for problem in target.problems(layer.shape, layer.bits, layer.group_size):
        yield Finding(name, problem, within(target))


def whole_zero_points(name: str, layer: IntegerLayer, target: Target) -> Iterator[Finding]:
    """Zero points are integers of the width: most formats store them so."""
    zero = layer.zero_points
    if bool((zero != zero.round()).any()):
        problem = "its zero points are not whole numbers, and rounding them now would move weights"
        yield Finding(name, problem, within(target))
    elif bool(((zero < 0) | (zero >= 2**layer.bits)).any()):
        yield Finding(name, f"a zero point lies outside 0..{2**layer.bits - 1}", within(target))


def exact_scales(
    name: str, layer: IntegerLayer, dtype: torch.dtype, target: Target
) -> Iterator[Finding]:
    """Scales are the same numbers in `dtype`."""
    if not torch.equal(layer.scales, layer.scales.to(dtype).float()):
        problem = f"a scale is no {str(dtype).removeprefix('torch.')} number: its range is extreme"
        yield Finding(name, problem, within(target))


def within(target: Target) -> str:
    """The remedy for a layer that the format cannot hold."""
    return (
        f'Quantize with target="{target.name}", which keeps to what the format holds, or leave '
        "such layers float with modules_to_not_convert."
    )


def fused_alike(schemes: Mapping[str, object], float_linears: list[str]) -> Iterator[Finding]:
    """Advice: vLLM merges some layers, and refuses those whose schemes differ.

    Args:
        schemes: of each quantized layer, anything that can be compared.
        float_linears: names of the layers that stayed float.
    """
    known = {**schemes, **dict.fromkeys(float_linears)}
    parents = dict.fromkeys(name.rpartition(".")[0] for name in schemes)
    for parent in parents:
        for parts in FUSED:
            names = [f"{parent}.{part}" for part in parts]
            found = [known[name] for name in names if name in known]
            if any(scheme != found[0] for scheme in found[1:]):
                yield Finding(
                    names[0],
                    f"{', '.join(parts)} differ, and vLLM runs them as one layer",
                    "Give them the same bits and group size.",
                    is_loss=False,
                )
