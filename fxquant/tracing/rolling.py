"""The marked rounds of a Python loop become one node.

before: mark(n, 0, 0); a0 = select(x, 1, 0); h0 = a0 + zero
        mark(n, 0, 1); a1 = select(x, 1, 1); h1 = a1 + h0
        mark(n, 0, 2); a2 = select(x, 1, 2); h2 = a2 + h1; mark(n, 0, -1)
        y = collect([h0, h1, h2], n, 1, True)
after:  l = loop(body, n, (zero,), (x,)); y = stack(l[1], 1)

Each round must be the same ops on what has the same place: a value of this round, of the round
before (in the first round: an initial value), of outside, or a number that grows by the same step
from round to round. Else the loop is not rolled, and why is said.
"""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from fxquant.graph.effects import is_random
from fxquant.graph.loops import REFERENCES, loop, name_of_function
from fxquant.graph.ops import op_of
from fxquant.graph.structures import output_dict
from fxquant.tracing.loop_marks import COLLECT, END, MARK

aten = torch.ops.aten
_NUMBER_SPACES = ("_operator", "math")


class CannotRollError(Exception):
    """The rounds of a loop are not all the same."""


def roll_loops(graph: Graph) -> None:
    """Replace the rounds of each marked loop by a `loop` node.

    Raises:
        CannotRollError: the rounds differ, or more is read of them than the last values and lists.
    """
    marks: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node.target is MARK:
            marks.setdefault(node.args[1], []).append(node)
    for number, found in marks.items():
        expected = [*range(len(found) - 1), END]
        if [n.args[2] for n in found] != expected:
            raise CannotRollError("a loop over a size ends early, or runs inside of another one")
        _Rounds(graph, found, number).roll()


class _Rounds:
    """The rounds of one loop."""

    def __init__(self, graph: Graph, marks: list[Node], number: int) -> None:
        self.graph, self.marks, self.number = graph, marks, number
        self.rounds: list[list[Node]] = []
        self.place: dict[Node, tuple[int, int]] = {}  # the round of a node, and where in it
        self.initial: list[Any] = []
        self.next: list[Any] = []
        self.outer: list[Node] = []
        self.carried: dict[tuple[Any, int], int] = {}

    def roll(self) -> None:
        """Put the `loop` node in the place of the rounds."""
        self._collect_rounds()
        first = self.rounds[0]
        if any(len(nodes) != len(first) for nodes in self.rounds):
            raise CannotRollError("the rounds of a loop over a size do not all do the same")
        steps = [self._step([nodes[i] for nodes in self.rounds]) for i in range(len(first))]
        finals, lists = self._read_outside()
        slots = {i: self.next.index(i) if i in self.next else self._slot(None, i) for i in finals}
        body = (
            tuple(steps),
            tuple(("step", i) for i in self.next),
            tuple(("step", i) for i in lists),
        )
        with self.graph.inserting_before(self.marks[-1]):
            made = self.graph.call_function(
                loop, (body, self.marks[0].args[0], tuple(self.initial), tuple(self.outer))
            )
            for i, node in finals.items():
                last = self.graph.call_function(operator.getitem, (made, slots[i]))
                node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in self.place)
        for position, (i, readers) in enumerate(lists.items()):
            for reader in readers:
                self._join(reader, i, made, len(self.next) + position)
        for node in reversed([n for nodes in self.rounds for n in nodes]):
            self.graph.erase_node(node)
        for mark in self.marks:
            self.graph.erase_node(mark)

    def _collect_rounds(self) -> None:
        """The nodes of each round, without what all of them read."""
        start, end = self.marks[0], self.marks[-1]
        inside: list[list[Node]] = []
        node = start
        while node is not end:
            if node in self.marks:
                inside.append([])
            else:
                inside[-1].append(node)
            node = node.next
        # A number of sizes is computed where it is first read, so often in the first round only.
        home = {n: r for r, nodes in enumerate(inside) for n in nodes}
        self._move_before(
            inside, lambda n: any(home.get(user, home[n]) != home[n] for user in n.users)
        )
        if any(len(nodes) != len(inside[0]) for nodes in inside):
            self._move_before(inside, lambda n: True)
        self.rounds = inside
        self.place = {n: (r, i) for r, nodes in enumerate(inside) for i, n in enumerate(nodes)}

    def _move_before(self, inside: list[list[Node]], is_wanted: Callable[[Node], bool]) -> None:
        """Put numbers of sizes before the loop that read nothing of it."""
        members = {n for nodes in inside for n in nodes}
        for nodes in inside:
            for node in list(nodes):
                if (
                    _is_number(node)
                    and is_wanted(node)
                    and not members.intersection(node.all_input_nodes)
                ):
                    self.marks[0].prepend(node)
                    members.remove(node)
                    nodes.remove(node)

    def _step(self, nodes: list[Node]) -> tuple[Any, ...]:
        first = nodes[0]
        name = name_of_function(first.target) if first.op == "call_function" else None
        if name is None or any(n.target is not first.target for n in nodes):
            raise CannotRollError(f"a round of a loop over a size calls {first.target}")
        if is_random(first):
            raise CannotRollError("a round of a loop over a size draws random numbers")
        if op_of(first).product is not None and any(map(_is_weight, first.all_input_nodes)):
            raise CannotRollError("a round of a loop over a size multiplies with a weight")
        args = self._unified([n.args for n in nodes])
        names = [tuple(n.kwargs) for n in nodes]
        if any(given != names[0] for given in names):
            raise CannotRollError(f"the rounds of a loop over a size call {name} differently")
        kwargs = tuple((key, self._unified([n.kwargs[key] for n in nodes])) for key in names[0])
        return name, args, kwargs

    def _unified(self, values: list[Any]) -> Any:
        """One value, or reference, that stands for what is at this place in each round."""
        first = values[0]
        if any(isinstance(v, Node) for v in values):
            return self._reference(values)
        if isinstance(first, tuple | list):
            if any(type(v) is not type(first) or len(v) != len(first) for v in values):
                raise CannotRollError("the rounds of a loop over a size read lists of other sizes")
            if first and first[0] in REFERENCES:
                raise CannotRollError(f"a round of a loop over a size has an argument {first}")
            return tuple(self._unified([v[i] for v in values]) for i in range(len(first)))
        if all(type(v) is type(first) and v == first for v in values):
            return first
        if all(type(v) is int for v in values):
            step = values[1] - first
            if all(v == first + step * i for i, v in enumerate(values)):
                return ("index", first, step)
        raise CannotRollError(f"the rounds of a loop over a size have other arguments: {values}")

    def _reference(self, values: list[Any]) -> tuple[Any, ...]:
        places = [self.place.get(v) if isinstance(v, Node) else None for v in values]
        numbers = {place[1] for place in places[1:] if place is not None}
        if len(numbers) == 1 and None not in places[1:]:
            index = numbers.pop()
            if places == [(r, index) for r in range(len(values))]:
                return ("step", index)
            if places[1:] == [(r, index) for r in range(len(values) - 1)] and places[0] is None:
                return ("carried", self._slot(values[0], index))
        if places == [None] * len(values) and isinstance(values[0], Node):
            step = _growth(values)
            if step is not None:
                if values[0] not in self.outer:
                    self.outer.append(values[0])
                number = self.outer.index(values[0])
                return ("offset", number, step) if step else ("outer", number)
        raise CannotRollError("the rounds of a loop over a size read values of further rounds")

    def _slot(self, initial: Any, index: int) -> int:
        """The carried value that is `initial` first and then what a step gave."""
        if isinstance(initial, tuple | list):
            raise CannotRollError("a loop over a size carries a list")
        key = (initial, index)
        if key not in self.carried:
            self.carried[key] = len(self.next)
            self.initial.append(initial)
            self.next.append(index)
        return self.carried[key]

    def _read_outside(self) -> tuple[dict[int, Node], dict[int, list[Node]]]:
        """Which steps' last values are read after the loop, and who reads all values of which."""
        finals: dict[int, Node] = {}
        lists: dict[int, list[Node]] = {}
        for node, (round_, index) in self.place.items():
            for user in node.users:
                if user in self.place or user in lists.get(index, []):
                    continue
                if self._reads_all(user, index):
                    lists.setdefault(index, []).append(user)
                elif round_ == len(self.rounds) - 1 and user.target is not COLLECT:
                    finals[index] = node
                else:
                    raise CannotRollError(
                        f"after a loop over a size, {user.target} reads more than its last values"
                    )
        return finals, lists

    def _reads_all(self, user: Node, index: int) -> bool:
        """Whether it is given what a step made as a list, each round's value in order."""
        if user.target is not COLLECT and user.op != "output" and user.target is not output_dict:
            return False
        values = [nodes[index] for nodes in self.rounds]
        given = _with_list(user.args, values, True), _with_list(user.kwargs, values, True)
        return given != (user.args, user.kwargs)

    def _join(self, reader: Node, index: int, made: Node, position: int) -> None:
        """Give a reader the list of what a step made; `collect` becomes `stack` or `cat`."""
        with self.graph.inserting_after(made):
            values = self.graph.call_function(operator.getitem, (made, position))
        if reader.target is not COLLECT:
            wanted = [nodes[index] for nodes in self.rounds]
            reader.args = _with_list(reader.args, wanted, values)
            reader.kwargs = _with_list(reader.kwargs, wanted, values)
            return
        _, _, dim, is_new_dim = reader.args
        join = aten.stack.default if is_new_dim else aten.cat.default
        with self.graph.inserting_before(reader):
            joined = self.graph.call_function(join, (values, dim))
        joined.meta = dict(reader.meta)
        reader.replace_all_uses_with(joined)
        self.graph.erase_node(reader)


def _growth(values: list[Any]) -> int | None:
    """What is added to the first value from round to round, 0 where it stays; None if neither."""
    first = values[0]
    added = [0]
    for value in values[1:]:
        sign = {operator.add: 1, operator.sub: -1}.get(value.target)
        if value is first:
            added.append(0)
        elif sign and value.args[0] is first and isinstance(value.args[1], int):
            added.append(sign * value.args[1])
        else:
            return None
    step = added[1]
    return step if added == [step * i for i in range(len(added))] else None


def _with_list(value: Any, wanted: list[Node], found: Any) -> Any:
    """The arguments with `found` in the place of the list `wanted`."""
    if isinstance(value, list) and list(value) == wanted:
        return found
    if isinstance(value, tuple | list):
        return type(value)(_with_list(v, wanted, found) for v in value)
    if isinstance(value, dict):
        return {k: _with_list(v, wanted, found) for k, v in value.items()}
    return value


def _is_weight(node: Node) -> bool:
    """Whether it is a parameter or computed of parameters only: a layer is no part of a loop."""
    if node.op == "call_function" and node.all_input_nodes:
        return all(map(_is_weight, node.all_input_nodes))
    return node.op == "get_attr"


def _is_number(node: Node) -> bool:
    """Whether it computes a number of sizes, not a tensor."""
    if node.target is aten.sym_size.int:
        return True
    target: Any = node.target
    space = str(getattr(target, "__module__", ""))
    is_python = space in _NUMBER_SPACES or getattr(target, "__name__", "").startswith("sym_")
    return is_python and node.op == "call_function" and target is not operator.getitem
