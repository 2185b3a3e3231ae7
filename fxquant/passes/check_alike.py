"""Processes that share a run must be given the same; what they are given is compared by digest."""

import hashlib
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from fxquant.config.quant_config import QuantConfig
from fxquant.distributed.processes import Processes
from fxquant.graph.calls import Call
from fxquant.numerics.digest import digest_of


def check_alike(
    processes: Processes, model: nn.Module, config: QuantConfig, calls: Sequence[Call]
) -> None:
    """Refuse to share a run of different things.

    Raises:
        OptionError: in all processes, where one was given another model, data or options.
    """
    if processes.count == 1:
        return
    tensors = [*model.named_parameters(), *model.named_buffers()]
    weights = [digest_of(name, str(t.dtype), t) for name, t in tensors]
    for what, found, remedy in (
        ("options", sorted(config.to_dict().items()), "Call it with the same arguments."),
        ("model", weights, "Load the same files, or seed the random weights."),
        (
            "calibration data",
            call_digests(calls),
            "Give each process all of the data, in the same order: they are shared here.",
        ),
    ):
        processes.check_alike(what, hashlib.sha256(repr(found).encode()).hexdigest(), remedy)


def call_digests(calls: Iterable[Call]) -> list[list[tuple[str, str]]]:
    """Of each call: where its arguments are, and their digests (of what is no tensor, the text)."""
    return [
        [
            (at, digest_of("", str(v.dtype), v) if isinstance(v, Tensor) else repr(v))
            for at, v in call.leaves()
        ]
        for call in calls
    ]
