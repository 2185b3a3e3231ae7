"""What a layer reads in the calls behind its first, in the float graph.

A layer that runs several times, such as one block that is called twelve times, is fitted to all its
calls. Only the first is reached while nothing is quantized behind it; what the others read is
collected beforehand, in one run of the float graph.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.graph.layers import layer_arguments
from fxquant.graph.left_alone import left_alone
from fxquant.observers.moments import LayerMoments
from fxquant.passes.block_moments import add_call, empty_moments
from fxquant.passes.calibrate import run_call
from fxquant.passes.layer_maker import Blocks
from fxquant.passes.observe_inputs import InputWatcher
from fxquant.passes.padding import padding_mask
from fxquant.passes.turns import repeated_layers


@torch.no_grad()
def moments_of_later_calls(
    gm: GraphModule, names: Collection[str], calls: Sequence[Call], watcher: InputWatcher
) -> dict[str, list[LayerMoments]]:
    """Of layers that several nodes call: the moments of all inputs but the first.

    Args:
        gm: the float graph; it is not run where no layer has several calls.
        names: of the layers that will be quantized.
        calls: batches.
        watcher: is given what these layers read.

    Returns:
        The moments of each block of rows, by the name of the layer.

    Raises:
        CalibrationError: the graph does not take a batch.
    """
    moments = dict[str, list[LayerMoments]]()
    counts: dict[nn.Module, int] = defaultdict(int)
    batch, mask = 0, None

    def hook_for(name: str, blocks: Blocks) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            counts[layer] += 1
            if counts[layer] > 1:
                arguments = layer_arguments(args, kwargs)
                add_call(moments[name], blocks, range(blocks.count), arguments, None, mask)
                watcher.add(watcher.seen, name, arguments, mask, batch)

        return hook

    repeated = repeated_layers(gm, set(names))
    with left_alone(gm):
        for layer, name in repeated.items():
            blocks = Blocks(layer)
            moments[name] = empty_moments(blocks, range(blocks.count))
            layer.register_forward_hook(hook_for(name, blocks), with_kwargs=True)
        for batch, call in enumerate(calls if repeated else ()):
            counts.clear()
            mask = padding_mask(call)
            run_call(gm, call, batch)
    return moments
