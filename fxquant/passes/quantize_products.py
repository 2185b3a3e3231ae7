"""Round the factors of products of two values, such as attention's scores, to 8 bits.

before: `scores = q @ k`
after:  `scores = dequantize_activation(quantize_activation(q, …), …) @ …`, with static ranges;
        `scores = rounded_vectors(q, -1) @ rounded_vectors(k, -2)`, with ranges found on the way

The rounded values are multiplied as floats: there is no kernel for such products.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch.fx import GraphModule, Node

from fxquant.distributed.parts import parts_of
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.activation_products import activation_products
from fxquant.graph.calls import Call
from fxquant.graph.copying import copy_sharing_tensors
from fxquant.graph.effects import writes_before
from fxquant.graph.layers import finish, free_name
from fxquant.graph.shapes import DTYPE, MODULE_PATH, record_shapes
from fxquant.modules.activation import dequantize_activation, rounded_vectors
from fxquant.observers import Observer, create_observer
from fxquant.passes.calibrate import name_observers, run_call
from fxquant.passes.quantize_activations import insert_grid

_FLOAT = "float factors"
_STATIC = "static 8-bit factors, simulated"
_DYNAMIC = "dynamic 8-bit factors, simulated"


def products_in_float(gm: GraphModule) -> dict[str, str]:
    """What the record says of the products of a graph whose factors stay float, by node."""
    return {product.name: _FLOAT for product in activation_products(gm)}


def rounded_products(gm: GraphModule) -> list[str]:
    """The products of a graph whose factors it rounds, by the names of their nodes."""
    roundings = (dequantize_activation, rounded_vectors)
    products = activation_products(gm).items()
    return [p.name for p, factors in products if any(f.target in roundings for f in factors)]


def quantize_products(
    gm: GraphModule,
    calls: Sequence[Call],
    observer: str | None,
    processes: Processes = ALONE,
) -> tuple[GraphModule, dict[str, str]]:
    """Round the factors of all products of two values.

    Args:
        gm: a rewritten graph; it is not changed.
        calls: batches, which give static ranges.
        observer: of these ranges, a name that `create_observer` knows; None: ranges are found while
            the graph runs, one for each vector that is multiplied.
        processes: that share the batches.

    Returns:
        A new graph, and how the factors of each product are rounded, by the name of its node.

    Raises:
        CalibrationError: a factor is NaN or Inf.
    """
    made = copy_sharing_tensors(gm)
    if calls and any(DTYPE not in f.meta for p in activation_products(made).values() for f in p):
        record_shapes(made, calls[0])  # integers are no factors
    products = activation_products(made)
    if observer is None:
        _round_on_the_way(made, products)
    else:
        _round_in_ranges(made, products, calls, observer, processes)
    finish(made)
    how = _DYNAMIC if observer is None else _STATIC
    return made, {product.name: how for product in products}


def _round_on_the_way(gm: GraphModule, products: Mapping[Node, Mapping[Node, int | None]]) -> None:
    for product, factors in products.items():
        for factor, axis in factors.items():
            with gm.graph.inserting_before(product):
                rounded = gm.graph.call_function(rounded_vectors, (factor, axis))
            rounded.meta[MODULE_PATH] = product.meta.get(MODULE_PATH)
            product.replace_input_with(factor, rounded)


def _round_in_ranges(
    gm: GraphModule,
    products: Mapping[Node, Mapping[Node, int | None]],
    calls: Sequence[Call],
    observer: str,
    processes: Processes,
) -> None:
    """Watch each factor that is not rounded yet, then put its grid in the observer's place."""
    watched: dict[tuple[Node, int], Node] = {}
    written = writes_before(gm)
    for product, factors in products.items():
        for factor in factors:
            if factor.target is dequantize_activation:
                continue
            place = factor, written[product]
            if place not in watched:
                watched[place] = _watch(gm, product, factor, create_observer(observer))
            product.replace_input_with(factor, watched[place])
    finish(gm)
    names = [str(node.target) for node in watched.values()]
    observers = _observed(gm, names, calls, observer, processes)
    for node in watched.values():
        (factor,) = node.all_input_nodes
        path = node.meta.get(MODULE_PATH)
        rounded = insert_grid(
            gm, node, factor, observers[str(node.target)].calculate_qparams(), path
        )
        node.replace_all_uses_with(rounded)
        gm.graph.erase_node(node)
        gm.delete_submodule(str(node.target))


def _watch(gm: GraphModule, product: Node, factor: Node, observer: Observer) -> Node:
    name = free_name(gm, f"{factor.name}_observer")
    gm.add_submodule(name, observer)
    with gm.graph.inserting_before(product):
        node = gm.graph.call_module(name, (factor,))
    node.meta[MODULE_PATH] = product.meta.get(MODULE_PATH)
    return node


def _observed(
    gm: GraphModule,
    names: Sequence[str],
    calls: Sequence[Call],
    kind: str,
    processes: Processes,
) -> dict[str, Observer]:
    """What observers saw in all batches, by name; parts of the data are merged in their order."""
    merged = {name: create_observer(kind) for name in names}
    parts = [partial(_seen_in, gm, names, calls, part, kind) for part in parts_of(len(calls))]
    for seen in processes.in_order(parts):
        for name, observer in seen.items():
            merged[name].merge(observer)
    for name, observer in merged.items():
        gm.set_submodule(name, observer)
    name_observers(gm)
    for observer in merged.values():
        observer.check()
    return merged


@torch.no_grad()
def _seen_in(
    gm: GraphModule, names: Sequence[str], calls: Sequence[Call], part: range, kind: str
) -> dict[str, Observer]:
    seen = {name: create_observer(kind) for name in names}
    for name, observer in seen.items():
        gm.set_submodule(name, observer)
    for batch in part:
        for observer in seen.values():
            observer.batch = batch
        run_call(gm, calls[batch], batch)
    return seen
