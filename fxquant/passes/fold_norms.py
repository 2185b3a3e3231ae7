"""Fold each BatchNorm into the layer before it.

before: `y = self.conv(x); z = self.norm(y)`
after:  `z = self.conv(x)`, with the outputs of the convolution multiplied by what the norm
        multiplies by, in its weight, and what the norm adds in its bias

A norm is folded where it has running statistics and reads a layer that will be quantized and whose
output nothing else reads (to ask for its shape or dtype is no reading), where no other code reads
the tensors of either of them, and where each call of the one goes with a call of the other. It
stays where the layer's weight is a parameter that the user's own code multiplies with: a copy of
the user's class could not hold what the norm adds. What it takes to undo this in a copy of the
user's class is in `FoldedNorm`. A norm that the caller names among what is not to be converted
stays.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.batch_norms import BatchNormCall, batch_norm_call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.layers import Site, finish, has_hooks, sites, tensor_attribute
from fxquant.graph.ops import is_inquiry
from fxquant.graph.parameters import memory_of
from fxquant.modules.weight_forms import LayerForm, form_of
from fxquant.passes.decide import Decision, add_notes
from fxquant.passes.pack_parameters import bare_layers

FOLDED_RULE = "folded"  # of the decision on a norm that is in its layer now
_CALLERS_NAMES = ("modules_to_not_convert", "skip_layer_names")


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm that was folded into a layer.

    Attributes:
        norm: the user's name of it; of a function, of what owns its statistics.
        layer: the name of the layer.
        tensors: the user's names of the norm's tensors, by role: `"running_mean"`,
            `"running_var"`, and `"weight"` and `"bias"` where it has them.
        eps: what it adds to the variance.
    """

    norm: str
    layer: str
    tensors: Mapping[str, str]
    eps: float


@dataclass(frozen=True)
class NormsFolded:
    """What `fold_norms` made.

    Attributes:
        gm: the graph; it computes what it did before, up to rounding.
        decisions: on its layers and on the norms that are in them now.
        folded: the norms.
        saved_bytes: how many bytes fewer each layer takes, by name, than it took with its norm.
    """

    gm: GraphModule
    decisions: list[Decision]
    folded: tuple[FoldedNorm, ...] = ()
    saved_bytes: Mapping[str, int] = field(default_factory=dict)


@torch.no_grad()
def fold_norms(gm: GraphModule, decisions: Iterable[Decision]) -> NormsFolded:
    """Fold the norms behind all layers that will be quantized.

    Args:
        gm: a traced model; it is not changed.
        decisions: from `decide`.

    Returns:
        A graph with fewer nodes, or `gm` itself where there is nothing to fold.
    """
    decisions = list(decisions)
    if not any(batch_norm_call(gm, node) for node in gm.graph.nodes):
        return NormsFolded(gm, decisions)
    made = copy_sharing_tensors(gm, frozen=True)
    bare = bare_layers(gm)
    folds = _find(made, [d for d in decisions if d.module not in bare])
    saved = {fold.record.layer: fold.saved_bytes for fold in folds}
    for fold in folds:
        fold.apply(made)
    made.delete_all_unused_submodules()
    finish(made)
    folded = tuple(fold.record for fold in folds)
    into = {name: f.layer for f in folded for name in (f.norm, *f.tensors.values())}
    explained = [
        replace(d, rule=FOLDED_RULE, reason=f"folded into {into[d.module]}")
        if d.module in into
        else d
        for d in decisions
    ]
    notes = {f.layer: f"BatchNorm {f.norm} folded in" for f in folded}
    return NormsFolded(made, add_notes(explained, notes), folded, saved)


@dataclass(frozen=True)
class _Fold:
    """A layer under one name, and the calls of the norm that read its calls, in order."""

    places: list[Site]
    norms: list[BatchNormCall]
    weight: Tensor
    bias: Tensor

    @property
    def record(self) -> FoldedNorm:
        norm = self.norms[0]
        return FoldedNorm(norm.name, self.places[0].name, dict(norm.names), norm.eps)

    @property
    def saved_bytes(self) -> int:
        """Of the norm's tensors and its counter of batches, less a bias that the layer lacked."""
        own = self.places[0].module._parameters.get("bias")
        norm = sum(t.nbytes for t in self.norms[0].tensors.values()) + self.norms[0].counter_bytes
        return norm - (self.bias.nbytes if own is None else 0)

    def apply(self, gm: GraphModule) -> None:
        """Let the layer, in a graph of its own, do what the norm does, and take out the norm."""
        layer = self.places[0].module
        layer.register_parameter("weight", nn.Parameter(self.weight, requires_grad=False))
        layer.register_parameter("bias", nn.Parameter(self.bias, requires_grad=False))
        for norm in self.norms:
            constants = [n for n in norm.node.all_input_nodes if n.op == "get_attr"]
            norm.node.replace_all_uses_with(norm.source)
            gm.graph.erase_node(norm.node)
            for constant in constants:
                if not constant.users:
                    _remove_constant(gm, constant)


def _find(gm: GraphModule, decisions: Iterable[Decision]) -> list[_Fold]:
    chosen = {d.module for d in decisions if d.bits is not None}
    kept = {d.module for d in decisions if d.rule.startswith(_CALLERS_NAMES)}
    places: dict[nn.Module, list[Site]] = defaultdict(list)
    for site in sites(gm):
        places[site.module].append(site)
    readers = _readers(gm)
    found = []
    for layer, called in places.items():
        form = form_of(layer)
        if form is None or form.scaled is None or called[0].name not in chosen:
            continue
        norms = [_norm_behind(site) for site in called]
        calls = [norm for norm in norms if norm is not None]
        if len(calls) < len(norms) or not all(n.is_same(calls[0]) for n in calls):
            continue
        if kept.isdisjoint((calls[0].name, *calls[0].names.values())) and _is_alone(
            layer, called, calls, readers
        ):
            fold = _folded(layer, form, called, calls)
            found += [fold] if fold is not None else []
    return found


def _norm_behind(site: Site) -> BatchNormCall | None:
    """The norm that is all that reads the values of a layer's output."""
    readers = [user for user in site.node.users if not is_inquiry(user)]
    if site.is_inside or len(readers) != 1:
        return None
    call = batch_norm_call(site.gm, readers[0])
    is_once = call is not None and call.node.all_input_nodes.count(site.node) == 1
    return call if call is not None and is_once and call.source is site.node else None


def _is_alone(
    layer: nn.Module,
    called: list[Site],
    norms: list[BatchNormCall],
    readers: Mapping[int, set[Node]],
) -> bool:
    """Whether nothing else sees the layer's output or reads a tensor of the layer or the norm."""
    own, behind = {site.node for site in called}, {norm.node for norm in norms}
    return (
        not has_hooks(layer)
        and all(readers[memory_of(t)] <= own for t in layer.parameters())
        and all(readers[memory_of(t)] <= behind for t in norms[0].tensors.values())
    )


def _folded(
    layer: nn.Module, form: LayerForm, called: list[Site], norms: list[BatchNormCall]
) -> _Fold | None:
    """The layer's new weight and bias; None where they would not do what the norm does."""
    assert form.scaled is not None  # other layers were left out
    assert form.outputs is not None
    factor, offset = norms[0].factor_and_offset()
    shapes = {(len(factor), norm.rank) for norm in norms}
    if shapes != {form.outputs(layer)} or norms[0].eps >= 1:
        return None
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    made = form.scaled(layer, factor).to(weight.dtype)
    added = (offset if bias is None else bias * factor + offset).to(weight.dtype)
    if not bool(made.isfinite().all()) or not bool(added.isfinite().all()):
        return None
    return _Fold(called, norms, made, added)


def _readers(gm: GraphModule) -> dict[int, set[Node]]:
    """The nodes that read each memory of a parameter, a buffer or a constant."""
    found: dict[int, set[Node]] = defaultdict(set)
    for node in gm.graph.nodes:
        if node.op == "call_module":
            module = gm.get_submodule(str(node.target))
            for tensor in (*module.parameters(), *module.buffers()):
                found[memory_of(tensor)].add(node)
        elif node.op == "get_attr" and isinstance(value := tensor_attribute(gm, node), Tensor):
            found[memory_of(value)].update(node.users)
    return found


def _remove_constant(gm: GraphModule, constant: Node) -> None:
    """Take a constant that nobody reads any more out of the graph and its module."""
    owner, _, name = str(constant.target).rpartition(".")
    delattr(gm.get_submodule(owner), name)
    gm.graph.erase_node(constant)
