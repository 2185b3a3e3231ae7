"""Decide: rules over the nodes with parameters make the table of decisions. No weight is touched.

The first rule of this list that applies decides:

1. a layer that nothing calls, an opaque module, or a weight without a `LayerForm`, stays float
2. `modules_to_not_convert`, `skip_layer_names`
3. `skip_layer_types`; `layer_types` that leave it out
4. the weight of an embedding that is quantized: the layers tied to it read the same integers
5. `bits`, where it is a mapping; `embeddings`, of rows that are looked up
6. a weight tied to a layer that stays float, a router of experts (by default only)
7. `skip_param_threshold`
8. fewer inputs than `group_size`: INT8, whatever width was asked for
9. `target`: a weight that the format cannot hold
10. all others are quantized

What the caller says of one layer by its exact name in `bits`, or of embeddings by `embeddings`,
goes before the defaults of rules 2 and 3.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.fx import GraphModule

from fxquant.config.option_checks import FLOAT_BITS
from fxquant.config.quant_config import QuantConfig
from fxquant.config.skip_rules import (
    DEFAULT_INT4_SKIP,
    NameRule,
    check_names_match,
    check_types_match,
    is_type_match,
    type_name,
)
from fxquant.config.targets import TARGETS
from fxquant.graph.parameters import ParameterNode, memory_of, parameter_nodes
from fxquant.graph.routing import routers
from fxquant.modules.weight_forms import chosen_form, form_of, has_real_values, matrix_of
from fxquant.numerics.integers import INT8, WIDTHS
from fxquant.numerics.quantized_weight import ONE_GROUP, is_per_channel

FELL_BACK = "rounded to nearest"  # in the reason of a layer that was to be fitted
DEFAULT_RULE = "default"  # no rule names the layer: it gets the width of the configuration
ACTIONS = {**{bits: f"int{bits}" for bits in WIDTHS}, FLOAT_BITS: "float"}
BITS_OF = {action: bits for bits, action in ACTIONS.items() if bits != FLOAT_BITS}


@dataclass(frozen=True)
class Decision:
    """A row of the table of decisions.

    Attributes:
        module: the qualified name in the user's model.
        kind: the module's class or the op.
        shape: of the weight, [out, in] for a linear layer.
        parameters: elements of all parameters of the node.
        action: `"int4"`, for example (2, 3, 4, 5, 6 or 8 bits), or `"float"`.
        rule: which rule decided.
        reason: why, in words.
        product: the kind of product that the weight is a factor of, or None.
        weight_elements: elements of that weight; 0 without a product.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    action: str
    rule: str
    reason: str
    product: str | None = None
    weight_elements: int = 0

    @property
    def bits(self) -> int | None:
        """Of an integer of the weight; None for float."""
        return BITS_OF.get(self.action)


def decide(
    gm: GraphModule, config: QuantConfig, stored_one_by_one: Collection[str] = ()
) -> list[Decision]:
    """Decide about each layer of a traced model.

    Args:
        gm: a graph from `trace`.
        config: the caller's rules.
        stored_one_by_one: names of layers of experts whose matrices a folder of the target's format
            has one by one, as it has those of linear layers.

    Returns:
        One row for each node with parameters, in the order of the graph.

    Raises:
        RuleError: a rule that the caller wrote selects nothing.
    """
    nodes = parameter_nodes(gm)
    _check_rules(nodes, config)
    weights = _Weights(routers=routers(gm), stored_one_by_one=set(stored_one_by_one))
    decided = {n.name: _decide_node(n, config, weights) for n in nodes if n.is_lookup}
    weights.looked_up = {
        memory_of(n.parameters[0]): (n.name, decided[n.name].action)
        for n in nodes
        if n.is_lookup and decided[n.name].bits is not None
    }
    weights.float_ones = {
        memory_of(p): node.name
        for node in nodes
        if memory_of(node.parameters[0]) not in weights.looked_up
        and (node.is_lookup or not _is_quantizable(node) or _skipped_type(node, config))
        for p in node.parameters
    }
    rest = (n for n in nodes if not n.is_lookup)
    decided |= {n.name: _decide_node(n, config, weights) for n in rest}
    return [decided[node.name] for node in nodes]


@dataclass
class _Weights:
    """What is known of weights that several layers may read, by their memory.

    Attributes:
        looked_up: the embedding that reads it, and its action, where that is quantized.
        float_ones: a layer that reads it and stays float.
        routers: names of layers that choose experts.
        stored_one_by_one: see `decide`.
    """

    looked_up: dict[int, tuple[str, str]] = field(default_factory=dict)
    float_ones: dict[int, str] = field(default_factory=dict)
    routers: set[str] = field(default_factory=set)
    stored_one_by_one: set[str] = field(default_factory=set)


def add_notes(decisions: Iterable[Decision], notes: Mapping[str, str]) -> list[Decision]:
    """The decisions with what later passes have to say, by name, at the end of their reasons."""
    return [
        replace(d, reason=f"{d.reason}; {notes[d.module]}") if d.module in notes else d
        for d in decisions
    ]


def _check_rules(nodes: list[ParameterNode], config: QuantConfig) -> None:
    names = [node.name for node in nodes]
    kinds = [node.kind for node in nodes]
    check_names_match("modules_to_not_convert", config.modules_to_not_convert or (), names)
    check_names_match("skip_layer_names", config.skip_layer_names or (), names)
    check_types_match("skip_layer_types", config.skip_layer_types or (), kinds)
    check_types_match("layer_types", config.layer_types or (), kinds)
    if isinstance(config.bits, Mapping):
        check_names_match("bits", config.bits, names)


def _decide_node(node: ParameterNode, config: QuantConfig, weights: _Weights) -> Decision:
    action, rule, reason = _first_rule(node, config, weights)
    kind = type_name(node.kind)
    elements = 0
    if node.product is not None:
        elements = sum(p.numel() for p in node.parameters if p.ndim >= 2)
    return Decision(
        node.name, kind, node.shape, node.parameter_count, action, rule, reason,
        node.product, elements,
    )  # fmt: skip


def _first_rule(
    node: ParameterNode, config: QuantConfig, weights: _Weights
) -> tuple[str, str, str]:
    if node.is_idle:
        why = "the graph does not call it: it did not run on the example, or its weight is used by "
        return "float", "not called", why + "other code"
    if node.is_opaque:
        return "float", "opaque", "it runs inside a module that could not be traced"
    pattern = _matching_name(config.modules_to_not_convert or (), node.name)
    if pattern is not None:
        return "float", f"modules_to_not_convert: {pattern}", "the caller keeps it float"
    is_meant, tied = _is_meant(node, config), weights.looked_up.get(memory_of(node.parameters[0]))
    names, origin = _with_origin(config.skip_layer_names, "skip_names")
    pattern = _matching_name(names, node.name)
    is_default = config.skip_layer_names is None
    if pattern is not None and not (is_default and (is_meant or tied)):
        return "float", f"{origin}: {pattern}", "name is skipped"
    kind = _skipped_type(node, config)
    if kind is not None:
        _, origin = _with_origin(config.skip_layer_types, "skip_types")
        return "float", f"{origin}: {type_name(kind)}", "type is skipped"
    if not _is_quantizable(node):
        return "float", "op table", _why_not(node)
    if config.layer_types is not None and not any(
        is_type_match(kind, node.kind) for kind in config.layer_types
    ):
        return "float", "layer_types", "its type is not among the chosen ones"
    if tied is not None and not is_meant:
        name, action = tied
        return action, f"tied weight: {name}", f"its weight is that of {name}"
    bits, rule, reason = _bits_of(node, config)
    if bits == FLOAT_BITS:
        return "float", rule, reason
    is_explicit = isinstance(config.bits, Mapping) or config.skip_layer_names is not None
    other = weights.float_ones.get(memory_of(node.parameters[0]))
    if other is not None and not is_explicit:
        return "float", "default: tied weight", f"its weight is shared with {other}, which is float"
    if node.name in weights.routers and not is_explicit:
        why = "it chooses experts: a little error would make it choose others"
        return "float", "default: router", why
    is_linear = node.name in weights.stored_one_by_one
    return _by_size(node, config, bits, rule, reason, is_linear)


def _by_size(
    node: ParameterNode,
    config: QuantConfig,
    bits: int,
    rule: str,
    reason: str,
    is_linear: bool,
) -> tuple[str, str, str]:
    threshold = config.skip_param_threshold
    origin = "skip_param_threshold"
    if threshold is None:
        threshold, origin = DEFAULT_INT4_SKIP.skip_param_threshold, f"default: {origin}"
    if node.parameter_count < threshold and not isinstance(config.bits, Mapping):
        why = f"{node.parameter_count} parameters are fewer than {threshold}"
        return "float", origin, why
    inputs = 0 if node.module is None else matrix_of(node.module).shape[1]
    if bits < INT8.bits and is_per_channel(bits, config.group_size, inputs):
        why = f"{inputs} inputs are fewer than a group of {config.group_size}"
        bits, rule, reason = INT8.bits, "group_size", f"{why}: INT8 per channel instead"
    problem = _target_problem(node, config, bits, is_linear)
    if problem is not None:
        return "float", f"target: {config.target}", problem
    book = config.form(bits)["code_book"]
    return ACTIONS[bits], rule, reason if book is None else f"{reason}, with the levels of {book}"


def _target_problem(
    node: ParameterNode, config: QuantConfig, bits: int, is_linear: bool
) -> str | None:
    """Why the format that the model will be exported to cannot hold the layer, or None.

    Args:
        node: the layer's.
        config: the caller's rules.
        bits: that the layer would have.
        is_linear: whether its matrices are linear layers there, whatever its kind.
    """
    form = None if node.module is None else form_of(node.module)
    if config.target is None or form is None:
        return None
    if form.kind != "linear" and not is_linear:
        return f"the format holds no {form.kind}"
    is_per_row = bits == INT8.bits or config.group_size == ONE_GROUP
    group_size = node.shape[-1] if is_per_row else config.group_size
    problems = TARGETS[config.target].problems(node.shape[-2:], bits, group_size)
    return problems[0] if problems else None


def _bits_of(node: ParameterNode, config: QuantConfig) -> tuple[int, str, str]:
    assert node.module is not None  # nodes without a form stayed float
    form = chosen_form(node.module)
    if isinstance(config.bits, Mapping) and node.name in config.bits:
        return config.bits[node.name], "bits", f"the mapping gives it {config.bits[node.name]}"
    if form.is_lookup:
        bits = FLOAT_BITS if config.embeddings is None else config.embeddings
        return bits, "embeddings", _chosen(form.phrase, bits)
    if not isinstance(config.bits, Mapping):
        return config.bits, DEFAULT_RULE, f"{_chosen(form.phrase, config.bits)} by default"
    pattern = _matching_name(config.bits, node.name)
    if pattern is None:
        return FLOAT_BITS, "bits", "the mapping does not name it"
    return (
        config.bits[pattern],
        f"bits: {pattern}",
        f"the mapping gives it {config.bits[pattern]}",
    )


def _chosen(phrase: str, bits: int) -> str:
    return f"{phrase}, float" if bits == FLOAT_BITS else f"{phrase}, {bits} bits"


def _why_not(node: ParameterNode) -> str:
    """Why there is no way to quantize a node, in words."""
    sizes = " x ".join(map(str, node.shape))
    if node.is_lookup:
        return "its rows are looked up by code that is no Embedding layer"
    if not has_real_values(node.parameters[0]):
        weight = node.parameters[0]
        what = "without elements" if not weight.numel() else f"of {weight.dtype}"
        return f"a weight ({sizes}) {what} cannot be rounded to integers"
    match node.product:
        case "expert":
            experts, *matrix = node.shape
            each = " x ".join(map(str, matrix))
            return f"expert weights ({experts} of {each}) used in a form that is no grouped product"
        case "linear" if node.module is not None:
            return f"{type_name(node.kind)} computes more than a linear layer"
        case "linear":
            return f"{type_name(node.kind)} uses this weight ({sizes}) in a form that is no layer"
        case None:
            return f"{type_name(node.kind)} is no product with a weight"
    return f"{node.product} weights ({sizes}): not quantized"


def _is_quantizable(node: ParameterNode) -> bool:
    return node.module is not None and form_of(node.module) is not None and not node.is_opaque


def _is_meant(node: ParameterNode, config: QuantConfig) -> bool:
    """Whether the caller wants this very layer quantized, by its name or as an embedding."""
    if isinstance(config.bits, Mapping) and config.bits.get(node.name, FLOAT_BITS) != FLOAT_BITS:
        return True
    return node.is_lookup and config.embeddings is not None


def _skipped_type(node: ParameterNode, config: QuantConfig) -> Any:
    if config.skip_layer_types is None and _is_meant(node, config):
        return None
    types, _ = _with_origin(config.skip_layer_types, "skip_types")
    return next((kind for kind in types if is_type_match(kind, node.kind)), None)


def _with_origin(given: Sequence[Any] | None, entry: str) -> tuple[Sequence[Any], str]:
    """The caller's list, or the default's entry, and how a decision names the rule."""
    if given is None:
        return getattr(DEFAULT_INT4_SKIP, entry), f"default: {entry}"
    return given, entry.replace("skip_", "skip_layer_")


def _matching_name(patterns: Iterable[str], name: str) -> str | None:
    return next((p for p in patterns if NameRule(p).is_match(name)), None)


def why_float(decisions: Iterable[Decision], most: int = 3) -> str:
    """The reasons that leave most parameters float, for an error: how many layers have each."""
    layers, parameters = Counter[str](), Counter[str]()
    for decision in decisions:
        if decision.bits is None:
            layers[decision.reason] += 1
            parameters[decision.reason] += decision.parameters
    shown = [f"{layers[reason]} times: {reason}" for reason, _ in parameters.most_common(most)]
    return "; ".join(shown)
