"""Which of an exported graph's assumptions about sizes are needed: tried on the model itself."""

from collections.abc import Iterator

from torch.fx import GraphModule

from fxquant.graph.calls import Call
from fxquant.tracing.guards import holds, is_about_sizes
from fxquant.tracing.loop_marks import FEWEST_ROUNDS
from fxquant.tracing.oracle import Answer, Oracle, describe_axis
from fxquant.tracing.variations import Axis

LONGEST_PROBE = 130  # sizes up to which the bounds of guards are tried


def export_examples(oracle: Oracle) -> Iterator[tuple[Call, bool]]:
    """Calls to export with: sizes that may change, then other lengths, then fixed sizes.

    A size of 1 would be taken as fixed, and the rounds of a loop are told apart from 3 on.
    """
    call = oracle.example
    for axis in oracle.axes:
        if axis.size < FEWEST_ROUNDS:
            call = axis.resized(call, FEWEST_ROUNDS)
    yield call, True
    for axis in oracle.axes[1:]:  # a window or a block may ask for longer inputs
        yield axis.resized(call, 2 * axis.size + 3), True
    yield call, False


def needed_guards(
    gm: GraphModule, guards: list[str], fixed: list[str], oracle: Oracle
) -> list[str] | str:
    """The guards without which the graph would compute other values than the model.

    A guard that some call breaks, although the graph and the model agree on it, is not needed.
    Where no call breaks it, one is looked for. What cannot be written as a check of sizes has to
    hold.

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
    agreed: dict[int, bool] = {}

    def agrees(answer: Answer) -> bool:
        if id(answer) not in agreed:
            agreed[id(answer)] = oracle.compare(gm, answer) == (None, None)
        return agreed[id(answer)]

    for guard in (*guards, *fixed):
        broken = [a for a in answers if _breaks(gm, guard, a.call)]
        if not broken:
            if guard in fixed:
                continue
            found = _call_that_breaks(gm, guard, oracle)
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
    return needed


def _breaks(gm: GraphModule, guard: str, call: Call) -> bool:
    return holds(guard, _arguments(gm, call)) is False


def _arguments(gm: GraphModule, call: Call) -> dict[str, object]:
    names = {str(n.target): (*n.args, None)[0] for n in gm.graph.nodes if n.op == "placeholder"}
    return call.bind(names)


def _call_that_breaks(gm: GraphModule, guard: str, oracle: Oracle) -> Answer | None:
    """The model's answer to the nearest call that breaks the guard and that the model takes."""
    for axis in oracle.axes:
        sizes = [s for gap in range(1, LONGEST_PROBE) for s in (axis.size - gap, axis.size + gap)]
        breaking = [s for s in sizes if s > 0 and _breaks(gm, guard, _as_meta(axis, oracle, s))]
        for size in breaking[:2]:
            answer = oracle.ask(axis.resized(oracle.example, size), describe_axis(axis, size))
            if answer is not None:
                return answer
    return None


def _as_meta(axis: Axis, oracle: Oracle, size: int) -> Call:
    """The call of another size with tensors that have sizes only."""
    return axis.resized(oracle.example.map(lambda tensor: tensor.to("meta")), size)
