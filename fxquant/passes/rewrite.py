"""Rewrite: carry the ledger's decisions out.

before: `fc = self.fc(x)` with `fc` an `nn.Linear`
after:  `fc = self.fc(x)` with `fc` a `QuantizedLinearInt4` or `QuantizedLinearInt8`
"""

from collections.abc import Callable, Iterable

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import WeightError
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.scopes import sites
from fxquant.modules.linear import QuantizedLinear
from fxquant.passes.decide import Decision

QuantizeLinear = Callable[[str, nn.Linear, int], QuantizedLinear]


def rewrite(
    gm: GraphModule, decisions: Iterable[Decision], quantize_linear: QuantizeLinear
) -> GraphModule:
    """Swap each Linear that the ledger quantizes.

    Args:
        gm: a traced model; it is not changed.
        decisions: the ledger.
        quantize_linear: makes a quantized layer from `(name, linear, bits)`.

    Returns:
        A new graph whose nodes have the same names and whose parameters need no gradient. One
        Linear called from several nodes stays one module.

    Raises:
        WeightError: a weight cannot be quantized; the layer is named.
    """
    bits = {d.module: d.bits for d in decisions if d.bits is not None}
    rewritten = copy_sharing_tensors(gm, frozen=True)
    made: dict[nn.Module, QuantizedLinear] = {}
    for site in list(sites(rewritten)):
        linear = site.module
        if not isinstance(linear, nn.Linear) or site.name not in bits:
            continue
        if linear not in made:
            made[linear] = _quantize(site.name, linear, bits[site.name], quantize_linear)
        site.scope.gm.set_submodule(str(site.node.target), made[linear])
    return rewritten


def _quantize(
    name: str, linear: nn.Linear, bits: int, quantize_linear: QuantizeLinear
) -> QuantizedLinear:
    try:
        return quantize_linear(name, linear, bits).eval()
    except WeightError as error:
        raise WeightError(
            f"{name}.weight", found=error.found, needed=error.needed, remedy=error.remedy
        ) from error


def dequantize_model(qmodel: GraphModule) -> GraphModule:
    """A float model with the same weights: each quantized layer becomes an `nn.Linear`.

    Args:
        qmodel: a quantized graph; it is not changed.

    Returns:
        A new graph. Activation quantize/dequantize nodes stay.
    """
    rewritten = copy_sharing_tensors(qmodel)
    made: dict[nn.Module, nn.Module] = {}
    for site in list(sites(rewritten)):
        if isinstance(site.module, QuantizedLinear):
            made.setdefault(site.module, site.module.to_linear())
            site.scope.gm.set_submodule(str(site.node.target), made[site.module])
    return rewritten
