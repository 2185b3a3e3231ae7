"""What several formats ask of a layer, each as findings."""

from collections.abc import Iterator, Mapping

import torch

from fxquant.exporters.findings import Finding
from fxquant.exporters.integer_layer import IntegerLayer
from fxquant.exporters.source import Source

FLOAT = "Leave it float with modules_to_not_convert."
# Layers that vLLM runs as one product, so that their schemes must be the same.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def float_activations(source: Source) -> Iterator[Finding]:
    """The format holds weights: activations would not be quantized where it runs."""
    remedy = "Quantize without activation_bits."
    if source.has_static_activations:
        yield Finding("activations", "the format has no static ranges of activations", remedy)
    for name, layer in source.layers.items():
        if layer.activation != "float":
            yield Finding(name, "the format has no int8 activations", remedy)


def known_width(
    name: str, layer: IntegerLayer | None, widths: tuple[int, ...]
) -> Iterator[Finding]:
    """The layer has one of the `widths`, in bits."""
    if layer is None or layer.bits not in widths:
        found = "a layer of another kind" if layer is None else f"{layer.bits} bits"
        known = " or ".join(map(str, widths))
        yield Finding(name, f"the format has no {found}, only {known} bits", FLOAT)


def whole_zero_points(name: str, layer: IntegerLayer) -> Iterator[Finding]:
    """Zero points are integers of the width: most formats store them so."""
    zero = layer.zero_points
    if bool((zero != zero.round()).any()):
        yield Finding(
            name,
            "its zero points are not whole numbers, and rounding them now would move every weight",
            "Quantize with symmetric=True.",
        )
    elif bool(((zero < 0) | (zero >= 2**layer.bits)).any()):
        yield Finding(
            name,
            f"a zero point lies outside 0..{2**layer.bits - 1}",
            "Quantize with symmetric=True.",
        )


def exact_scales(name: str, layer: IntegerLayer, dtype: torch.dtype) -> Iterator[Finding]:
    """Scales are the same numbers in `dtype`."""
    if not torch.equal(layer.scales, layer.scales.to(dtype).float()):
        short = str(dtype).removeprefix("torch.")
        yield Finding(name, f"a scale is no {short} number", f"{FLOAT} Its range is extreme.")


def whole_groups(name: str, layer: IntegerLayer, multiple: int = 1) -> Iterator[Finding]:
    """Every group has the same number of columns, a multiple of `multiple`."""
    columns = layer.shape[1]
    size = min(layer.group_size, columns)
    if columns % size or size % multiple:
        yield Finding(
            name,
            f"groups of {size} do not divide its {columns} inputs into groups of one size"
            + (f" that is a multiple of {multiple}" if multiple > 1 else ""),
            f"Quantize with a group_size that divides {columns}, or leave it float.",
        )


def divisible(name: str, layer: IntegerLayer, rows: int, columns: int) -> Iterator[Finding]:
    """The shape fills whole words."""
    out_features, in_features = layer.shape
    if out_features % rows or in_features % columns:
        needed = f"outputs in multiples of {rows} and inputs in multiples of {columns}"
        problem = f"{out_features} x {in_features} does not fill the format's words: {needed}"
        yield Finding(name, problem, FLOAT)


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
