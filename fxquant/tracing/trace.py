"""`trace`: one graph of a model, by the best way that computes what the model computes.

1. symbolic tracing, through functions that libraries marked with `torch.fx.wrap`, too
2. `torch.export`, where example inputs are known; once more at a size that its graph refuses
3. the symbolic graph with opaque children, each exported on the inputs it saw where that works
4. the whole model is opaque: a graph of a single node around it

With example inputs each graph is compared with the user's own model (see `oracle.py`), on the
example and on other sizes; the first that agrees everywhere is taken. A graph that is right for
some sizes only gets checks that refuse the others; one that computes other values is never
returned.
A loop over a size whose rounds all do the same becomes one node, for any size (see `rolling.py`).
Another one is unrolled: a graph for one length, which refuses others, can be saved and the model's
own code cannot. Where other batches would be refused the model's own code stays all the same.
A check by value (`if x.isnan().any(): raise`) is one of the graph's, too (see `known_values.py`); a
branch on values is one where no value that is tried goes the other way, or where the graph of one
way is right for all (`value_checks.py`).
Without example inputs a graph is taken only where nothing of the forward can have been lost.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn
from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.graph.effects import calls_foreign_functions
from fxquant.graph.identity import FINGERPRINT, fingerprint
from fxquant.graph.layers import user_name
from fxquant.graph.left_alone import (
    evaluate,
    left_alone,
    process_left_alone,
    structure_left_alone,
)
from fxquant.graph.parameters import IDLE
from fxquant.graph.shapes import record_shapes
from fxquant.tracing.asked_biases import asking, names_of
from fxquant.tracing.assemble import assemble
from fxquant.tracing.bare_parameters import READ_ONLY, bare_parameters
from fxquant.tracing.canonical import canonicalize
from fxquant.tracing.capture import Capture
from fxquant.tracing.coverage import weigh
from fxquant.tracing.each_entry import drop_notes, listening
from fxquant.tracing.export import SHORT_LOOPS, capture_export
from fxquant.tracing.guards import insert_guards
from fxquant.tracing.inline import inline_children
from fxquant.tracing.loop_marks import FEWEST_ROUNDS
from fxquant.tracing.needed import export_examples, needed_guards, with_least_sizes
from fxquant.tracing.offload import loaded
from fxquant.tracing.opaque import describe_opaque, graph_around
from fxquant.tracing.oracle import Oracle, Verdict
from fxquant.tracing.prepare import check_initialized, prepare
from fxquant.tracing.proxies import has_wrapped_functions
from fxquant.tracing.signature import graph_arguments
from fxquant.tracing.symbolic import capture_symbolic
from fxquant.tracing.trace_report import REPORT_KEY, TraceReport
from fxquant.tracing.value_checks import ValueChecks, layer_without_node

MOST_WAYS = 2  # that a branch may take besides the example's, each of which is exported


def trace(model: nn.Module, example_inputs: object = None) -> GraphModule:
    """Capture `model` as a graph in which every linear layer is a node.

    Args:
        model: any module; it is left as it was. The graph shares its memory (training the one shows
            in the other) and is in eval mode.
        example_inputs: one call's arguments: a tensor, a tuple or list (positional), or a dict
            (keywords). Optional, but without them `torch.export` cannot be tried, optional
            arguments keep their defaults, and the graph is not verified against the model.

    Returns:
        A `GraphModule`; `trace_report` tells how it was made.

    Raises:
        TraceError: the model does not run on the example inputs, or cannot be copied.
        OptionError: it is no Python module.
    """
    model = loaded(model)
    inputs = None if example_inputs is None else Call.of(example_inputs)
    check_initialized(model)
    with process_left_alone(), structure_left_alone(model), asking() as asked:
        if inputs is not None:
            graph_arguments(model, inputs)  # inputs that do not fit are named before anything runs
        oracle = None if inputs is None else Oracle(model, inputs)
        with left_alone(model) as memory:
            evaluate(model)
            prepared = prepare(model, memory)
        chosen = _Search(prepared, oracle).run()
        gm = chosen.gm
        if oracle is not None:
            record_shapes(gm, oracle.example)
        gm.meta[FINGERPRINT] = fingerprint(model)
        weight = weigh(gm, model, prepared, oracle)
        gm.meta[IDLE] = weight.idle
        gm.meta[REPORT_KEY] = TraceReport(
            way=chosen.way,
            verified=chosen.verdict.checked,
            attempts=chosen.attempts,
            opaque=describe_opaque(gm, chosen.opaque),
            left_out=chosen.left_out,
            refused=[f"{r.label}: {r.reason}" for r in chosen.verdict.refused]
            + [f"values that go another way at {place}" for place in chosen.branches],
            unreached=weight.unreached,
            read_only=sorted(set(gm.meta.pop(READ_ONLY, []))),
            bare=bare_parameters(gm, model),
            without_bias=names_of(asked, model, prepared),
            product_elements=weight.product_elements,
            traced_elements=weight.traced_elements,
        )
    return gm


@dataclass
class _Found:
    """A graph, how it was made, and how it compares with the model."""

    gm: GraphModule
    way: str
    verdict: Verdict
    left_out: list[str] = field(default_factory=list)
    opaque: dict[str, str] = field(default_factory=dict)
    branches: list[str] = field(default_factory=list)  # at which it refuses other values
    turned: list[Call] = field(default_factory=list)  # inputs that go another way at a branch
    attempts: list[str] = field(default_factory=list)

    @property
    def faults(self) -> tuple[int, bool, int]:
        """What speaks against it: a smaller one is the better graph.

        Batches and lengths change from call to call, so a graph that takes them all is worth more
        than one without code of other libraries; a picture's size is mostly the same in all calls.
        """
        refused = self.verdict.refused
        needs_code = bool(self.opaque) or calls_foreign_functions(self.gm)
        return sum(not r.is_minor for r in refused), needs_code, len(refused)


class _Search:
    """Tries one way after another."""

    def __init__(self, prepared: nn.Module, oracle: Oracle | None) -> None:
        self.prepared, self.oracle = prepared, oracle
        self.attempts: list[str] = []
        self.best: _Found | None = None

    def run(self) -> _Found:
        """The first graph that does all that was tried, or the best of the others."""
        for found in self._candidates():
            if found.verdict.wrong is not None:
                self.attempts.append(f"model: {found.way}: {found.verdict.wrong}")
                continue
            if found.verdict.refused:
                first = found.verdict.refused[0]
                self.attempts.append(
                    f"model: {found.way}: it refuses {first.label}: {first.reason}"
                )
            if self.best is None or found.faults < self.best.faults:
                self.best = found
            if found.verdict.is_perfect:
                break
        best = self.best
        if best is None or self._is_narrow(best):
            around = self._around()
            best = around if around.verdict.wrong is None or best is None else best
        return replace(best, attempts=self.attempts)

    def _is_narrow(self, found: _Found) -> bool:
        """Whether the model's own code serves better than a graph that refuses some sizes.

        It does where other batches are refused, and where the model has layers for the other sizes
        that the graph does not call.
        """
        refused = [r for r in found.verdict.refused if not r.is_minor]
        if any(refusal.is_batch for refusal in refused):
            return True
        return bool(refused) and bool(
            weigh(found.gm, self.prepared, self.prepared, self.oracle).unreached
        )

    def _candidates(self) -> Iterator[_Found]:
        parts: list[Capture] = []
        yield from self._symbolic(parts, see_through=True)
        if self.oracle is not None:
            yield from self._exported(self.oracle)
        if has_wrapped_functions() and (self.best is None or any(self.best.faults[:2])):
            yield from self._symbolic(parts, see_through=False)
        if self.best is not None and not any(self.best.faults[:2]):
            return
        for capture in parts:
            if self.oracle is not None:
                notes: list[str] = []
                inlined = inline_children(capture, self.prepared, self.oracle, notes)
                self.attempts += notes
                if inlined is not None:
                    yield self._judged(inlined, "symbolic")
            yield self._judged(capture, "symbolic")

    def _symbolic(self, parts: list[Capture], *, see_through: bool) -> Iterator[_Found]:
        """The symbolic graph; one with opaque children goes to `parts`, for later."""
        capture = capture_symbolic(self.prepared, self._example, see_through=see_through)
        if isinstance(capture, str):
            self.attempts.append(f"model: symbolic: {capture}")
        elif not capture.opaque:
            yield self._judged(capture, "symbolic")
        elif all(p.opaque.keys() != capture.opaque.keys() for p in parts):
            # else functions marked with torch.fx.wrap are not what is in the way
            inside = ", ".join(f"{p}: {r}" for p, r in list(capture.opaque.items())[:3])
            self.attempts.append(f"model: symbolic: opaque inside: {inside}")
            parts.append(capture)

    @property
    def _example(self) -> Call | None:
        return None if self.oracle is None else self.oracle.example

    def _exported(self, oracle: Oracle) -> Iterator[_Found]:
        reasons: list[str] = []
        knew_values = False
        for call, are_sizes_free in export_examples(oracle):
            if self.best is not None:  # other examples are for models that refuse this one
                break
            if are_sizes_free and len(reasons) > 1 and len(set(reasons)) == 1:
                continue  # it is not the sizes that are in the way
            capture = capture_export(
                self.prepared, call, are_sizes_free=are_sizes_free, takes_short_loops=False
            )
            if capture == SHORT_LOOPS:  # more rows or tokens may give its loops more rounds
                longer = capture_export(self.prepared, with_least_sizes(oracle, FEWEST_ROUNDS))
                if not isinstance(longer, str):
                    yield self._judged(longer, "export")
                capture = capture_export(self.prepared, call, are_sizes_free=are_sizes_free)
            if isinstance(capture, str):
                reasons.append(capture)
                self.attempts.append(f"model: export: {capture}")
                if "GuardOnDataDependent" in capture:
                    yield from self._exported_with_known_values(oracle, call)
                    return
                continue
            yield self._judged(capture, "export")
            if capture.was_asked and self.best is None:  # then it does something else in eager mode
                capture = capture_export(
                    self.prepared, call, are_sizes_free=are_sizes_free, answers=(True,)
                )
                if not isinstance(capture, str):
                    yield self._judged(capture, "export")
                if self.best is None and not knew_values:
                    knew_values = True
                    yield from self._exported_with_known_values(oracle, call)
        yield from self._exported_at_refused_sizes(oracle)

    def _exported_at_refused_sizes(self, oracle: Oracle) -> Iterator[_Found]:
        """An export with the longest call that the best graph refuses.

        With a short example the parts of a sequence are few (one chunk of a scan): such a number is
        taken as fixed, where a number of several parts may change.
        """
        if self.best is None:
            return
        refused = [r.call for r in self.best.verdict.refused if not r.is_minor]
        if refused:
            longest = max(refused, key=lambda call: sum(t.numel() for t in call.tensors()))
            capture = capture_export(self.prepared, longest)
            if not isinstance(capture, str):
                yield self._judged(capture, "export")

    def _exported_with_known_values(self, oracle: Oracle, call: Call) -> Iterator[_Found]:
        """Graphs of the example's way, then of ways that other values take, each for all inputs."""
        longer = [c for c, are_sizes_free in export_examples(oracle) if are_sizes_free]
        examples = [(example, example) for example in dict.fromkeys((call, *longer))]
        has_turned = False
        while examples:
            example, values = examples.pop(0)
            capture = capture_export(self.prepared, example, answers=(True,), are_values_known=True)
            if isinstance(capture, str):
                self.attempts.append(f"model: export with known values: {capture}")
                if not has_turned:
                    return
                continue
            found = self._judged(capture, "export", values)
            refused = [r for r in found.verdict.refused if not r.is_minor]
            if found.verdict.wrong is None and not refused:
                examples = []
            elif found.verdict.wrong is None:  # it would refuse sizes, besides values
                reason = f"it refuses {refused[0].label}: {refused[0].reason}"
                found = replace(found, verdict=Verdict(reason))
            elif not has_turned and not (refused and examples):
                examples, has_turned = [(c, values) for c in found.turned[:MOST_WAYS]], True
            yield found

    def _judged(self, capture: Capture, way: str, values: Call | None = None) -> _Found:
        opaque = dict(capture.opaque)
        gm = canonicalize(assemble(capture, self.prepared), self.prepared)
        found = _Found(gm, way, Verdict(None), capture.left_out, opaque)
        if self.oracle is None:
            return found
        checks = ValueChecks(gm) if capture.branches else None
        needed = needed_guards(gm, capture.guards, capture.fixed, self.oracle)
        if isinstance(needed, str):
            return replace(found, verdict=Verdict(needed))
        if needed:
            insert_guards(gm.graph, needed)
            gm.recompile()
        with listening() as were_false:
            verdict = self.oracle.judge(gm)
        masks = drop_notes(gm.graph)
        if masks:
            gm.recompile()
        if verdict.wrong is None and masks - were_false:
            verdict = Verdict("it loops over the true entries of a mask, and all were true")
        found = replace(found, verdict=verdict)
        if checks is None or verdict.wrong is not None:
            return found
        wrong = checks.try_others(self.oracle, values or self.oracle.example, capture.compared)
        branches = checks.settle()
        lost = wrong or layer_without_node(found.gm, self.prepared)
        if lost is not None:
            place = capture.branches[0]
            reason = f"it branches on values of its inputs at {place} ({lost})"
            turned = [call for _, call in checks.turned]
            return replace(found, verdict=Verdict(reason, verdict.refused), turned=turned)
        return replace(found, branches=branches)

    def _around(self) -> _Found:
        gm = graph_around(self.prepared, self._example)
        reason = "; ".join(self.attempts[:3]) or "it was not traced"
        verdict = Verdict(None) if self.oracle is None else self.oracle.judge(gm)
        return _Found(gm, "opaque", verdict, opaque={user_name(gm, "_self"): reason})


def graph_of(model: nn.Module, example: Call | None) -> GraphModule:
    """The model's graph; one that `trace` made is taken as it is.

    Args:
        model: any module, or a graph from `trace`.
        example: one call's arguments, or None.
    """
    if isinstance(model, GraphModule) and REPORT_KEY in model.meta:
        return model
    return trace(model, example)
