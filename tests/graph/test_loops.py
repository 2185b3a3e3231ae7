"""A loop as one node: what it computes, what it refuses, and what others see of it."""

import pytest
import torch

import fxquant
from fxquant.errors import LoadError, ShapeError
from fxquant.graph.effects import writes
from fxquant.graph.loops import fault_of_loop, loop, name_of_function

aten = torch.ops.aten
SELECT = ("aten::select.int", (("outer", 0), 1, ("index", 0, 1)), ())
SUMS = (
    (SELECT, ("aten::add.Tensor", (("carried", 0), ("step", 0)), (("alpha", 2),))),
    (("step", 1),),
    (("step", 1), ("step", 0)),
)


def test_a_carried_value_goes_from_round_to_round_and_values_are_collected():
    x = torch.arange(6.0).reshape(2, 3)
    last, sums, columns = loop(SUMS, 3, (torch.zeros(2),), (x,))
    assert torch.equal(last, 2 * x.sum(1))
    assert torch.equal(torch.stack(sums, 1), 2 * x.cumsum(1))
    assert torch.equal(torch.stack(columns, 1), x)


def test_a_loop_without_rounds_is_refused_in_words():
    with pytest.raises(ShapeError, match="at least one"):
        loop(SUMS, 0, (torch.zeros(2),), (torch.zeros(2, 0),))


def test_an_index_starts_and_steps():
    body = ((("aten::select.int", (("outer", 0), 0, ("index", 4, -2)), ()),), (), (("step", 0),))
    (found,) = loop(body, 3, (), (torch.arange(5),))
    assert torch.stack(found).tolist() == [4, 2, 0]


def test_equal_numbers_of_other_types_are_other_bodies():
    def scaled(factor):
        step = ("aten::mul.Scalar", (("outer", 0), factor), ())
        return loop(((step,), (), (("step", 0),)), 1, (), (torch.ones(1, dtype=torch.long),))

    assert scaled(1)[0][0].dtype == torch.long
    assert scaled(1.0)[0][0].dtype == torch.float32


def test_a_loop_that_writes_into_memory_says_so():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    fill = ((SELECT, ("aten::copy_.default", (("step", 0), 0), ())), (), ())
    assert writes(graph.call_function(loop, (fill, 3, (), (x,))))
    assert not writes(graph.call_function(loop, (SUMS, 3, (x,), (x,))))


@pytest.mark.parametrize(
    "body",
    [
        ((("builtins.eval", ("1",), ()),), (), ()),
        ((("aten::set_.source_Tensor", (("outer", 0), ("outer", 0)), ()),), (), ()),
        ((("aten::view.dtype", (("outer", 0), torch.bool), ()),), (), ()),
        ((SELECT[:2],), (), ()),
        (((*SELECT,),), (), (("step", 4),)),
        ((("aten::neg.default", (("outer", 7),), ()),), (), ()),
        ((), (("step", 0),), ()),
        "text",
    ],
)
def test_a_body_that_a_file_may_not_hold_is_refused(body):
    x = torch.zeros(2, 2)
    assert fault_of_loop((body, 1, (), (x,))) is not None
    if isinstance(body, tuple) and body[0] and body[0][0][0] != "aten::neg.default":
        with pytest.raises((LoadError, ValueError, IndexError)):
            loop(body, 1, (), (x,))


def test_functions_are_named_only_where_a_file_may_name_them():
    assert name_of_function(aten.mul.Tensor) == "aten::mul.Tensor"
    assert name_of_function(aten.set_.source_Tensor) is None
    assert name_of_function(eval) is None


class Scan(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)

    def forward(self, x):
        h, state, states = self.inner(x), torch.zeros(x.shape[0], 64), []
        for t in range(x.shape[1]):
            state = 0.5 * state + h[:, t]
            states.append(state)
        return self.out(torch.stack(states, 1))


def test_a_loop_survives_a_file_and_takes_other_lengths(tmp_path):
    torch.manual_seed(0)
    q, info = fxquant.static_quantize(
        Scan(),
        [torch.randn(2, 6, 64)],
        group_size=32,
        skip_param_threshold=0,
        accuracy_warning="ignore",
    )
    assert not fxquant.trace_report(q).opaque
    assert [n for n in q.graph.nodes if n.target is loop]
    fxquant.save_model(q, tmp_path / "scan.safetensors", info)
    again = fxquant.load_model(tmp_path / "scan.safetensors")
    for length in (1, 6, 33):
        x = torch.randn(3, length, 64)
        assert torch.equal(again(x), q(x))
