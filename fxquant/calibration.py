"""What data tell about a float graph: which batches choose integers, and what its layers read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from torch.fx import GraphModule

from fxquant.config.method import Recipe
from fxquant.config.quant_config import DYNAMIC, QuantConfig
from fxquant.distributed.processes import ALONE, Processes
from fxquant.graph.calls import Call
from fxquant.measure.heldout import hold_out
from fxquant.measure.row_parts import takes
from fxquant.observers.input_statistics import InputStatistics
from fxquant.passes.calibrate import calibrate, run_call
from fxquant.passes.calibration_data import check_batches
from fxquant.passes.decide import Decision
from fxquant.passes.fold_norms import FoldedNorm
from fxquant.passes.observe_inputs import InputWatcher, expected_inputs, of_blocks
from fxquant.passes.scale_channels import FoldedScale, scale_channels
from fxquant.passes.simulate import SimulatedActivations, SimulatedWeights
from fxquant.passes.token_noise import noisy_copies


@dataclass(frozen=True)
class Calibrated:
    """A float graph, perhaps with norms and scales folded in, and what data told about it.

    Attributes:
        gm: the float graph.
        decisions: on its layers.
        fitted: the batches that choose integers.
        copies: of these with tokens drawn at random, which choose integers too.
        held_out: those that choose none.
        watcher: knows what the inputs of layers look like: at once, or, where layers are fitted to
            their inputs, after that.
        folded: the scales that were folded into the graph.
        processes: that share the work.
        norms: the norms that were folded into layers of the graph.
        original: the graph before norms were folded into it; None: `gm`.
    """

    gm: GraphModule
    decisions: list[Decision]
    fitted: Sequence[Call]
    copies: Sequence[Call]
    held_out: Sequence[Call]
    watcher: InputWatcher
    folded: Sequence[FoldedScale] = ()
    processes: Processes = ALONE
    norms: Sequence[FoldedNorm] = ()
    original: GraphModule | None = None

    @property
    def choosing(self) -> list[Call]:
        """All batches that choose integers."""
        return [*self.fitted, *self.copies]

    @property
    def inputs(self) -> dict[str, InputStatistics]:
        """What is known of the inputs of layers' blocks of rows.

        What the data told, drawn towards what the graph promises where there were few tokens;
        without data that promise.
        """
        promised = expected_inputs(self.gm)
        seen = {
            name: [part.steadied(promised.get(name)) for part in statistics]
            for name, statistics in self.watcher.statistics.items()
        }
        return {**promised, **of_blocks(seen)}


def calibrated_on(
    gm: GraphModule,
    decisions: list[Decision],
    drawn: list[Call],
    config: QuantConfig,
    recipe: Recipe,
    processes: Processes,
) -> Calibrated:
    """Split the data, fold scales, and let the data through where layers are not fitted to it.

    Args:
        gm: the float graph.
        decisions: on its layers.
        drawn: all batches.
        config: what is wanted.
        recipe: of its method.
        processes: that share the work.

    Raises:
        CalibrationError: the data is not usable, or a layer reads NaN or Inf.
        OptionError: noise is wanted among tokens, and there are none.
    """
    names = selected(decisions)
    check_batches(drawn)
    # Where nothing will be quantized, the data only has to be accepted.
    fitted, held_out = hold_out(drawn, lambda call: takes(gm, call)) if names else (drawn, [])
    folded: Sequence[FoldedScale] = ()
    if recipe.scalings and names:
        weights = SimulatedWeights(config)
        activations = None
        if config.activation_bits is not None:
            activations = SimulatedActivations(config.observer, config.group_size)
        scaled = scale_channels(gm, decisions, fitted, recipe.scalings, weights, activations)
        gm, decisions, folded = scaled.gm, scaled.explain(decisions), scaled.folded
    return watched(gm, decisions, fitted, held_out, config, recipe, folded, processes)


def watched(
    gm: GraphModule,
    decisions: list[Decision],
    fitted: Sequence[Call],
    held_out: Sequence[Call],
    config: QuantConfig,
    recipe: Recipe,
    folded: Sequence[FoldedScale] = (),
    processes: Processes = ALONE,
) -> Calibrated:
    """Let the data through where layers are not fitted to it: that lets it through itself.

    Args:
        gm: the float graph.
        decisions: on its layers.
        fitted: the batches that choose integers.
        held_out: those that choose none.
        config: what is wanted.
        recipe: of its method.
        folded: the scales that were folded into the graph.
        processes: that share the work.

    Raises:
        CalibrationError: the graph does not take a batch, or a layer reads NaN or Inf.
        OptionError: noise is wanted among tokens, and there are none.
    """
    names = selected(decisions)
    is_fitted = recipe.rounding == "gptq"
    watcher = InputWatcher(
        gm,
        names,
        observer="minmax" if config.observer == DYNAMIC else config.observer,
        has_statistics=not is_fitted or config.method == "auto" or bool(config.activation_bits),
    )
    copies: Sequence[Call] = ()
    if not names:
        calibrate(gm, fitted)
    else:
        share = config.token_noise
        copies = noisy_copies(fitted, share, partial(run_call, gm, index=0), partial(takes, gm))
    calibrated = Calibrated(gm, decisions, fitted, copies, held_out, watcher, folded, processes)
    if names and not is_fitted:
        watcher.run(gm, calibrated.choosing, processes)
    return calibrated


def selected(decisions: Iterable[Decision]) -> list[str]:
    """The names of the layers that will be quantized."""
    return [decision.module for decision in decisions if decision.bits is not None]
