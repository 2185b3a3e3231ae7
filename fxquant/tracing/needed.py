"""Which of an exported graph's assumptions about sizes are needed: tried on the model itself."""

from collections.abc import Iterator
from itertools import islice

from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.tracing.guards import holds, is_about_sizes
from fxquant.tracing.oracle import Answer, Oracle, describe_axis
from fxquant.tracing.variations import Axis

LONGEST_PROBE = 130  # sizes up to which the bounds of guards are tried


def export_examples(oracle: Oracle) -> Iterator[tuple[Call, bool]]:
    """Calls to export with: sizes above 1 that may change, then other lengths, then fixed sizes."""
    call = with_least_sizes(oracle, 2)  # a size of 1 would be taken as fixed
    yield call, True
    for axis in oracle.axes[1:]:  # a window or a block may ask for longer inputs
        yield axis.resized(call, 2 * axis.size + 3), True
    yield oracle.example, False


def with_least_sizes(oracle: Oracle, least: int) -> Call:
    """The example with no size below `least` along an axis on which sizes may change."""
    call = oracle.example
    for axis in oracle.axes:
        if axis.size < least:
            call = axis.resized(call, least)
    return call


def needed_guards(
    gm: GraphModule, guards: list[str], fixed: list[str], oracle: Oracle
) -> list[str] | str:
    """The guards without which the graph would compute other values than the model.

    A guard that some call breaks, although the graph and the model agree on it, is not needed;
    where they agree on others that break it and not on this one, it is not needed if another guard
    refuses this one. Where no call breaks it, one is looked for. What cannot be written as a check
    of sizes has to hold.

    Args:
        gm: the graph.
        guards: what it assumes.
        fixed: sizes that it may have been made for; needed only where the model takes others.
        oracle: knows the model's answers.

    Returns:
        The guards to check, or why the graph is not usable.
    """
    needed = []
    answers = list(oracle.answers)
    probes = _Probes(gm, oracle)
    agreed: dict[int, bool] = {}

    def agrees(answer: Answer) -> bool:
        if id(answer) not in agreed:
            agreed[id(answer)] = oracle.compare(gm, answer) == (None, None)
        return agreed[id(answer)]

    for guard in (*guards, *fixed):
        broken = [a for a in answers if holds(guard, probes.arguments(a.call)) is False]
        if not broken:
            if guard in fixed:
                continue
            found = probes.answer_that_breaks(guard)
            if found is not None:
                answers.append(found)
                broken = [found]
        if broken and all(map(agrees, broken)):
            continue
        if not is_about_sizes(guard):
            if broken:
                return f"it assumes {guard}"
            continue
        needed.append(guard)
    breaking = {
        g: [a for a in answers if holds(g, probes.arguments(a.call)) is False] for g in needed
    }
    sure = [g for g in needed if not any(map(agrees, breaking[g]))]
    refused = {id(a) for g in sure for a in breaking[g]}
    return [
        g for g in needed
        if g in sure or any(not agrees(a) and id(a) not in refused for a in breaking[g])
    ]  # fmt: skip


class _Probes:
    """Calls of other sizes, to find one that breaks a guard; each is made once for all guards."""

    def __init__(self, gm: GraphModule, oracle: Oracle) -> None:
        self.oracle = oracle
        self.names = {
            str(n.target): (*n.args, None)[0] for n in gm.graph.nodes if n.op == "placeholder"
        }
        self.example = oracle.example.map(lambda tensor: tensor.to("meta"))
        self._sized: dict[tuple[Axis, int], dict[str, object]] = {}
        self._answers: dict[tuple[Axis, int], Answer | None] = {}

    def arguments(self, call: Call) -> dict[str, object]:
        """The inputs of the graph by name."""
        return call.bind(self.names)

    def answer_that_breaks(self, guard: str) -> Answer | None:
        """The model's answer to the nearest call that breaks the guard and that it takes."""
        for axis in self.oracle.axes:
            near = (
                s for gap in range(1, LONGEST_PROBE) for s in (axis.size - gap, axis.size + gap)
            )
            breaking = (s for s in near if s > 0 and holds(guard, self._at(axis, s)) is False)
            for size in islice(breaking, 2):
                answer = self._answer(axis, size)
                if answer is not None:
                    return answer
        return None

    def _at(self, axis: Axis, size: int) -> dict[str, object]:
        """The inputs of the graph at another size, with tensors that have sizes only."""
        if (axis, size) not in self._sized:
            self._sized[axis, size] = self.arguments(axis.resized(self.example, size))
        return self._sized[axis, size]

    def _answer(self, axis: Axis, size: int) -> Answer | None:
        if (axis, size) not in self._answers:
            call = axis.resized(self.oracle.example, size)
            self._answers[axis, size] = self.oracle.ask(call, describe_axis(axis, size))
        return self._answers[axis, size]
