"""How many bytes a run holds beside the model, from the shapes of its layers and values.

What each step holds at once is counted, and the largest is taken. A share is added for memory that
the allocator keeps although nothing is in it any more.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fxquant.measure.row_parts import MOST_ELEMENTS
from fxquant.observers.input_statistics import SAMPLE
from fxquant.observers.moments import MOST_HELD
from fxquant.passes.fitted_layers import FITTED_ELEMENTS
from fxquant.planning.rehearsal import Reading, Rehearsal
from fxquant.planning.work import Batches, LayerWork
from fxquant.tracing.results import MOST_KEPT
from fxquant.tracing.variations import COMPARED_ROWS

FLOAT = 4  # bytes of a float32
ALLOCATOR_SHARE = 1.2  # of what is held: freed memory that the process keeps
FACTOR_COPIES = 6  # of inputs x inputs in float32: the second moments on their way to their factor
FITTING_COPIES = 2  # of the same, while rows are fitted: the moments and their factor
ROUNDING_COPIES = 8  # of the rows that are fitted at once, in float32
CHECKED_BYTES = 20  # an element of a layer, where its error is measured: twice float64 and float32
KEPT_ANSWERS = 6  # of the model, that a graph is compared with
TRACING_OVERHEAD = 40_000_000  # bytes: nodes of candidate graphs, compilers that make them
OVERHEAD = 20_000_000  # bytes: code that is loaded, graphs, small tensors


@dataclass(frozen=True)
class Waiting:
    """Values that wait between layers.

    Attributes:
        bytes: at the turn with most of them.
        bound: on what waits in memory; None: none.
    """

    bytes: int
    bound: int | None

    @property
    def held(self) -> int:
        """What waits in memory."""
        return self.bytes if self.bound is None else min(self.bytes, self.bound)

    @property
    def spilled(self) -> int:
        """What waits in a file."""
        return self.bytes - self.held


def waiting_between(batches: Batches, bound: int | None) -> Waiting:
    """What waits where most does, in the float and in the quantized graph.

    The float graph may run ahead to the next turn, and at the last one nothing waits any more.
    """
    alive = [batches.waiting(i) for i in range(len(batches.readings))]
    return Waiting(max((a + min(a, b) for a, b in pairwise(alive)), default=0), bound)


def fitting_bytes(layers: Mapping[str, LayerWork], batches: Batches) -> int:
    """What the batch and the layers in work take at the turn where it is most."""
    running = 2 * max((batch.layers_peak for batch in batches.all), default=0)
    turns = [0]
    for index, reading in enumerate(batches.readings):
        own = [layers[name] for name in reading.layers if name in layers]
        if own:
            held = min(batches.held_tokens(index), MOST_HELD)
            sums = _sums(own, is_first=index == 0)
            kept = FLOAT * held * (2 * own[0].inputs + sum(_shifted(own)))
            copies = 2 if batches.parts > 1 else 1
            turns.append(kept + max(running + copies * sums, sums + _solving(own)))
    return max(turns)


def _sums(own: Sequence[LayerWork], *, is_first: bool) -> int:
    """The moments of layers that read one value: of it, of what it lacks, of outputs' shifts."""
    inputs, blocks = own[0].inputs, own[0].blocks
    lacks = 0 if is_first else inputs**2
    return 2 * FLOAT * blocks * (inputs**2 + lacks + inputs * sum(_shifted(own)))


def _shifted(own: Sequence[LayerWork]) -> list[int]:
    """Rows of the layers whose outputs have moments of their own: those behind a residual."""
    rows = [layer.rows for layer in own]
    return rows if len(own) == 1 or own[0].inputs > 2 * sum(rows) else []


def _solving(own: Sequence[LayerWork]) -> int:
    """Temporaries of the costliest layer's solution: most are gone when the factor is there."""
    inputs, most = own[0].inputs, max(layer.rows for layer in own) * own[0].inputs
    fitted = ROUNDING_COPIES * FLOAT * min(most, FITTED_ELEMENTS)
    square = FLOAT * inputs**2
    return max(FACTOR_COPIES * square, FITTING_COPIES * square + max(fitted, CHECKED_BYTES * most))


def statistics_bytes(layers: Mapping[str, LayerWork], readings: Sequence[Reading]) -> int:
    """The samples and sums of what layers read: of all data, and of a part of it."""
    leaders = [layers[r.layers[0]] for r in readings if r.layers[0] in layers]
    return 2 * sum(FLOAT * layer.inputs * SAMPLE for layer in leaders if layer.blocks == 1)


def measuring_bytes(batches: Batches) -> int:
    """Two graphs on as many rows as run at once, and the difference of their largest values."""
    return max(map(_measured_at_once, batches.all), default=0)


def _measured_at_once(batch: Rehearsal) -> int:
    whole = 2 * (batch.peak + FLOAT * batch.largest)
    return whole * _rows_at_once(batch) // batch.rows


def _rows_at_once(batch: Rehearsal) -> int:
    return min(max(1, MOST_ELEMENTS * batch.rows // max(batch.largest, 1)), batch.rows)


def parts_at_once(batch: Rehearsal) -> int:
    """In how many parts of its rows a batch is measured."""
    return -(-batch.rows // _rows_at_once(batch))


def tracing_bytes(example: Rehearsal) -> int:
    """A run of few rows, and parts of the answers that graphs are compared with."""
    share = COMPARED_ROWS / max(example.rows, 1)
    kept = FLOAT * min(MOST_KEPT, int(share * example.largest))
    return int(share * example.peak) + KEPT_ANSWERS * kept + TRACING_OVERHEAD


def checking_bytes(layers: Mapping[str, LayerWork]) -> int:
    """Temporaries of the largest layer, where what became of it is compared with what it was."""
    return max((CHECKED_BYTES * layer.elements for layer in layers.values()), default=0)


def peak_bytes(made: int, steps: Sequence[int]) -> int:
    """The peak of a run.

    Args:
        made: bytes of what it makes.
        steps: what each step holds besides.
    """
    return OVERHEAD + int(ALLOCATOR_SHARE * (made + max(steps, default=0)))
