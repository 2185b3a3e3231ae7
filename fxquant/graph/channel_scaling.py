"""Where a scale for each channel can be folded into a graph without changing what it computes.

For a linear layer's input x, x / s times W · s is the same product. The scale s is folded exactly
if x / s can be had from changed parameters alone: of a norm, a linear layer or an embedding behind
x, and if everything else that reads x takes part. This is found by following channel maps (see
`scale_rules`) from x to all producers and readers until nothing is left open. There is no table of
architectures.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxquant.graph.calls import Call
from fxquant.graph.interpreter import GraphInterpreter
from fxquant.graph.layers import tensor_attribute, user_name
from fxquant.graph.left_alone import left_alone, process_left_alone
from fxquant.graph.ops import op_name, op_of
from fxquant.graph.parameters import memory_of
from fxquant.graph.scale_rules import (
    CannotScaleError,
    Values,
    compress,
    is_sum,
    propagate_back,
    propagate_forward,
)
from fxquant.graph.shapes import input_values
from fxquant.graph.structures import tensors_in

NORMS = (nn.LayerNorm, nn.RMSNorm)
PASSING_MODULES = (nn.Dropout, nn.Identity, nn.ReLU, nn.LeakyReLU)


@dataclass(frozen=True)
class Edit:
    """A parameter to scale.

    Attributes:
        name: the user's name of the module or parameter.
        parameter: the tensor itself.
        channel_map: the channel of each element, broadcasting to the parameter; -1 leaves it alone.
        divides: whether the parameter is divided by the scale (a producer's) or multiplied.
        offset: what the graph adds to the parameter before it uses it (1 in some norms).
    """

    name: str
    parameter: Tensor
    channel_map: Tensor
    divides: bool
    offset: float = 0.0


@dataclass(frozen=True)
class Scaling:
    """A set of parameters that can be scaled together, channel by channel.

    Attributes:
        channels: how many channels the input has.
        group_of: for each channel, which scale it takes, [channels]; tied channels take the same.
        edits: all parameters that change.
        readers: linear layers that read the scaled value: their names and modules, with the channel
            of each of their inputs [in_features].
    """

    channels: int
    group_of: Tensor
    edits: tuple[Edit, ...]
    readers: tuple[tuple[str, nn.Linear, Tensor], ...]

    @property
    def producers(self) -> list[str]:
        """The names of what the scale is folded into."""
        return list(dict.fromkeys(e.name for e in self.edits if e.divides))


@torch.no_grad()
def apply_scale(scaling: Scaling, scale: Tensor) -> None:
    """Give the parameters scaled values, in new memory.

    Args:
        scaling: what to scale.
        scale: positive, [channels]; equal for tied channels.
    """
    for edit in scaling.edits:
        factor = torch.where(edit.channel_map >= 0, scale[edit.channel_map.clamp(min=0)], 1.0)
        factor = factor.reciprocal() if edit.divides else factor
        scaled = (edit.parameter.float() + edit.offset) * factor - edit.offset
        edit.parameter.data = scaled.to(edit.parameter.dtype)


class ScalingFinder:
    """Finds scalings in one graph.

    Args:
        gm: a traced model; its parameters are the ones that edits name.
        call: a batch, which is run once to learn shapes.
    """

    def __init__(self, gm: GraphModule, call: Call) -> None:
        self.gm = gm
        self.values = _observe(gm, call)
        self.readings = _count_readings(gm)

    def find(self, value: Node) -> Scaling:
        """How to scale the last dimension of `value`.

        Raises:
            CannotScaleError: it cannot be done; the text says what is in the way.
        """
        if value not in self.values.shapes or not self.values.shapes[value]:
            raise CannotScaleError("its input is no tensor")
        channels = self.values.shapes[value][-1]
        search = _ScaleSearch(self, channels)
        rank = len(self.values.shapes[value])
        search.propagate(value, torch.arange(channels).reshape((1,) * (rank - 1) + (-1,)))
        return search.result()


class _ScaleSearch:
    """Channel maps that follow from one channel map, and the edits they ask for."""

    def __init__(self, finder: ScalingFinder, channels: int) -> None:
        self.finder, self.values, self.channels = finder, finder.values, channels
        self.channel_maps: dict[Node, Tensor] = {}
        self.parent = list(range(channels))
        self.edits: list[Edit] = []
        self.readers: list[tuple[str, nn.Linear, Tensor]] = []

    def result(self) -> Scaling:
        """The scaling, once nothing is left open."""
        roots = torch.tensor([self._root(c) for c in range(self.channels)])
        return Scaling(
            self.channels,
            torch.unique(roots, return_inverse=True)[1],
            tuple(self.edits),
            tuple(self.readers),
        )

    def propagate(
        self,
        node: Node,
        channel_map: Tensor,
        operand: Node | None = None,
        reader: Node | None = None,
    ) -> None:
        """Note that `node` carries `channel_map`, having come from `operand` or from `reader`."""
        channel_map = compress(channel_map)
        if bool((channel_map < 0).all()):
            return
        if node in self.channel_maps:
            self._tie_or_refuse(node, channel_map)
            return
        self.channel_maps[node] = channel_map
        if operand is None:
            self._produce(node, channel_map)
        else:
            self._complete(node, channel_map, operand)
        for user in node.users:
            if user is not reader:
                self._read(user, node, channel_map)

    def _tie_or_refuse(self, node: Node, channel_map: Tensor) -> None:
        one, other = torch.broadcast_tensors(self.channel_maps[node], channel_map)
        if bool(((one < 0) != (other < 0)).any()):
            raise CannotScaleError(f"{node.name} would be scaled in part only")
        self._tie(one, other)

    def _tie(self, one: Tensor, other: Tensor) -> None:
        one, other = one.flatten(), other.flatten()
        differ = (one != other) & (one >= 0) & (other >= 0)
        pairs = torch.stack((one[differ], other[differ]), 1).unique(dim=0)
        for a, b in pairs.tolist():
            self.parent[self._root(a)] = self._root(b)

    def _root(self, channel: int) -> int:
        while self.parent[channel] != channel:
            channel = self.parent[channel]
        return channel

    def _complete(self, node: Node, channel_map: Tensor, operand: Node) -> None:
        """The other operands of an op one of whose operands is mapped."""
        others = [n for n in node.all_input_nodes if n is not operand]
        if node.op != "call_module" and is_sum(node):
            if not others:
                raise CannotScaleError(f"{node.name} adds a constant")
            self._produce_by_op(node, channel_map)
        elif any(n in self.channel_maps for n in others):
            raise CannotScaleError(f"both operands of {node.name} would be scaled")

    def _produce(self, node: Node, channel_map: Tensor) -> None:
        match node.op:
            case "placeholder":
                raise CannotScaleError(f"{node.name} is an input of the model")
            case "get_attr":
                self._scale_attribute(node, channel_map)
            case "call_module":
                self._produce_by_module(node, channel_map)
            case _:
                self._produce_by_op(node, channel_map)

    def _produce_by_op(self, node: Node, channel_map: Tensor) -> None:
        shifted = _shifted_parameter(node)
        if shifted is not None:
            self._scale_attribute(shifted[0], channel_map, shifted[1])
            return
        reasons = []
        for alternative in propagate_back(node, channel_map, self.values, self._tie):
            saved = dict(self.channel_maps), list(self.parent), list(self.edits), list(self.readers)
            try:
                for operand, needed in alternative:
                    self.propagate(operand, needed, reader=node)
                return
            except CannotScaleError as error:
                reasons.append(str(error))
                self.channel_maps, self.parent, self.edits, self.readers = saved
        reason = "; ".join(dict.fromkeys(reasons))
        raise CannotScaleError(reason or f"no operand of {node.name} has a place for the scale")

    def _produce_by_module(self, node: Node, channel_map: Tensor) -> None:
        module: Any = self.finder.gm.get_submodule(str(node.target))
        if isinstance(module, PASSING_MODULES) and isinstance(node.args[0], Node):
            self.propagate(node.args[0], channel_map, reader=node)
            return
        last = _last_axis(channel_map)
        if isinstance(module, nn.Linear) and last is not None:
            self._scale(node, module.weight, last[:, None], divides=True)
            if module.bias is not None:
                self._scale(node, module.bias, last, divides=True)
        elif isinstance(module, NORMS) and last is not None and _is_affine(module, len(last)):
            affine: list[Any] = [module.weight, getattr(module, "bias", None)]
            for parameter in affine:
                if parameter is not None:
                    self._scale(node, parameter, last, divides=True)
        elif isinstance(module, nn.Embedding) and last is not None:
            self._scale(node, module.weight, last[None], divides=True)
        else:
            kind = type(module).__name__
            name = user_name(self.finder.gm, str(node.target))
            raise CannotScaleError(f"{kind} {name} has no weight for the scale")

    def _read(self, user: Node, node: Node, channel_map: Tensor) -> None:
        if user.op == "output":
            raise CannotScaleError(f"{node.name} is an output of the model")
        if user.op == "call_module":
            self._read_by_module(user, node, channel_map)
            return
        try:
            reached = propagate_forward(user, node, channel_map, self.values)
        except KeyError as error:
            raise CannotScaleError(f"{user.name} cannot be followed") from error
        for target, carried in reached:
            self.propagate(target, carried, operand=node)

    def _read_by_module(self, user: Node, node: Node, channel_map: Tensor) -> None:
        module = self.finder.gm.get_submodule(str(user.target))
        if isinstance(module, PASSING_MODULES):
            self.propagate(user, channel_map, operand=node)
            return
        last = _last_axis(channel_map)
        if not isinstance(module, nn.Linear) or last is None:
            kind = type(module).__name__
            raise CannotScaleError(
                f"{kind} {user_name(self.finder.gm, str(user.target))} reads {node.name} too"
            )
        last = last.expand(module.in_features)
        self._scale(user, module.weight, last[None], divides=False)
        self.readers.append((user_name(self.finder.gm, str(user.target)), module, last))

    def _scale_attribute(self, node: Node, channel_map: Tensor, offset: float = 0.0) -> None:
        value = tensor_attribute(self.finder.gm, node)
        if not isinstance(value, nn.Parameter):
            raise CannotScaleError(f"{user_name(self.finder.gm, str(node.target))} is no parameter")
        if len(node.users) > 1:
            raise CannotScaleError(
                f"{user_name(self.finder.gm, str(node.target))} is used in several places"
            )
        while channel_map.ndim > value.ndim:
            channel_map = channel_map[0]
        self._scale(node, value, channel_map, divides=True, offset=offset)

    def _scale(
        self,
        node: Node,
        parameter: Tensor,
        channel_map: Tensor,
        *,
        divides: bool,
        offset: float = 0.0,
    ) -> None:
        name = user_name(self.finder.gm, str(node.target))
        if self.finder.readings[id(parameter)] > 1:
            raise CannotScaleError(f"a parameter of {name} is used in several places")
        self.edits.append(Edit(name, parameter, channel_map, divides, offset))


def _last_axis(channel_map: Tensor) -> Tensor | None:
    """The channel map of the last dimension, if it is the same everywhere else."""
    return channel_map.flatten() if channel_map.numel() == channel_map.shape[-1] else None


def _is_affine(norm: Any, width: int) -> bool:
    return norm.weight is not None and tuple(norm.weight.shape) == (width,)


def _shifted_parameter(node: Node) -> tuple[Node, float] | None:
    """The parameter and the number, where `node` is their sum, as `1 + weight` is."""
    if not is_sum(node) or op_name(node) not in ("add", "iadd"):
        return None
    numbers = [a for a in node.args if isinstance(a, int | float)]
    source: Any = next((a for a in node.args if isinstance(a, Node)), None)
    while isinstance(source, Node) and source.op != "get_attr" and len(source.users) == 1:
        is_cast = source.op != "call_module" and op_of(source).scale == "homogeneous"
        source = source.args[0] if is_cast and source.args else None
    if len(numbers) != 1 or not isinstance(source, Node) or source.op != "get_attr":
        return None
    return source, float(numbers[0])


def _count_readings(gm: GraphModule) -> Mapping[int, int]:
    """How often the memory of each parameter is used: by nodes, and under how many names."""
    readings = [p for node in gm.graph.nodes for p in _parameters_of(gm, node)]
    names = Counter(id(p) for _, p in gm.named_parameters(remove_duplicate=False))
    by_memory: dict[int, list[Tensor]] = defaultdict(list)
    for parameter in readings:
        by_memory[memory_of(parameter)].append(parameter)
    found: Counter[int] = Counter(names)
    for sharing in by_memory.values():
        ranges = [(p, *_range_of(p)) for p in sharing]
        for parameter, start, end in ranges:
            count = sum(first < end and start < last for _, first, last in ranges)
            found[id(parameter)] = max(count, names[id(parameter)])
    return found


def _range_of(tensor: Tensor) -> tuple[int, int]:
    """The first element in memory, and one behind the last."""
    start = tensor.storage_offset()
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(start), int(start + reach + 1)


def _parameters_of(gm: GraphModule, node: Node) -> list[Any]:
    if node.op == "get_attr":
        return [tensor_attribute(gm, node)]
    if node.op == "call_module":
        return list(gm.get_submodule(str(node.target)).parameters())
    return []


class _Observer(GraphInterpreter):
    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.shapes: dict[Node, torch.Size] = {}
        self.others: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n] = value.shape
        elif n.op != "output" and next(tensors_in(value), None) is None:
            self.others[n] = value
        return value


@torch.no_grad()
def _observe(gm: GraphModule, call: Call) -> Values:
    observer = _Observer(gm)
    with process_left_alone(), left_alone(gm):
        observer.run(*input_values(gm, call.clone()))
    return Values(observer.shapes, observer.others)
