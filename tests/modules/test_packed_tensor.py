"""A parameter of packed integers, read by code that multiplies with it in every way."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.algorithms.rtn import round_to_nearest
from fxquant.modules.grouped_linear import GroupedLinear
from fxquant.modules.linear_of import linear_of
from fxquant.modules.packed_parameter import PackedParameter, hand_over
from fxquant.modules.packed_tensor import PackedTensor
from fxquant.modules.weight_forms import form_of
from tests.compare import worst_sqnr

pytestmark = pytest.mark.usefixtures("float32_products")

E, IN, OUT = 4, 64, 96
X = torch.randn(6, IN)
NUMBERS = torch.tensor([3, 0, 0, 2, 3, -1])
ENDS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
SAME_SUMS = 110  # dB: the products differ in the order of their sums


def experts():
    layer = GroupedLinear(E, IN, OUT).eval()
    nn.init.normal_(layer.weight)
    form = form_of(layer)
    rows = round_to_nearest(form.matrix(layer).detach(), group_size=32)
    return form.quantized(layer, rows, None, None)


def matrix():
    rows = round_to_nearest(torch.randn(OUT, IN), group_size=32)
    return linear_of(rows, None, torch.float32)


# Code of users' models on a weight w [experts, out, in], and on one that is [out, in].
ON_EXPERTS = {
    "one by one": lambda w: torch.stack([F.linear(X, w[i]) for i in range(E)]),
    "an expert picked by a tensor": lambda w: X @ w[torch.tensor(2)].T,
    "iterated": lambda w: torch.stack([X.matmul(m.t()) for m in w]),
    "unbound": lambda w: torch.stack([torch.mm(X, m.mT) for m in w.unbind(0)]),
    "all at once": lambda w: torch.bmm(X.expand(E, -1, -1), w.transpose(1, 2)),
    "broadcast": lambda w: X @ w.mT,
    "weight first": lambda w: torch.bmm(w, X.mT.expand(E, -1, -1)),
    "picked by number": lambda w: torch.bmm(w[NUMBERS], X.unsqueeze(-1)).squeeze(-1),
    "picked, rows first": lambda w: torch.bmm(X.unsqueeze(1), w[NUMBERS].swapaxes(-1, -2)),
    "sorted": lambda w: F.grouped_mm(X, w.transpose(-2, -1), offs=ENDS),
}
ON_A_MATRIX = {
    "linear": lambda w: F.linear(X, w),
    "linear with a bias": lambda w: F.linear(X, weight=w, bias=torch.ones(OUT)),
    "transposed": lambda w: X @ w.t(),
    "cast": lambda w: F.linear(X, w.to(X.dtype).type_as(X).float().detach()),
    "viewed": lambda w: F.linear(X, w.contiguous().view(OUT, IN).reshape(w.shape)),
    "in another dtype": lambda w: F.linear(X.double(), w.to(torch.float64)).float(),
    "weight first": lambda w: w @ X.T,
}
# No product with the integers, so the values are used.
ON_VALUES = {
    "elementwise": lambda w: w * 2 + 1,
    "a slice": lambda w: X @ w[:2].mT,
    "einsum": lambda w: torch.einsum("ti,eoi->eto", X, w),
    "its output side": lambda w: torch.matmul(torch.ones(3, OUT), w),
    "into a tensor": lambda w: torch.mm(X, w[1].t(), out=torch.empty(len(X), OUT)),
    "a mask": lambda w: w[torch.tensor([True, False, True, False])],
    "another view": lambda w: X[:, :32] @ w.view(E * 2, -1, 32)[3].mT,
    "copied": lambda w: F.linear(X, w[1].clone().to(X.dtype, copy=True)),
    "concatenated": lambda w: torch.cat([w, w], 1),
}


@pytest.fixture
def dequantized(monkeypatch):
    """How often values were computed."""
    seen = []
    compute = PackedTensor.materialize
    monkeypatch.setattr(PackedTensor, "materialize", lambda w: seen.append(w) or compute(w))
    return seen


@pytest.mark.parametrize("code", ON_EXPERTS)
def test_products_with_experts_run_on_their_integers(code, dequantized):
    layer = experts()
    found = ON_EXPERTS[code](PackedTensor(layer))
    assert not dequantized
    assert worst_sqnr(ON_EXPERTS[code](layer.dequantize()), found) > SAME_SUMS


@pytest.mark.parametrize("code", ON_A_MATRIX)
def test_products_with_a_matrix_run_on_its_integers(code, dequantized):
    layer = matrix()
    found = ON_A_MATRIX[code](PackedTensor(layer))
    assert not dequantized
    assert worst_sqnr(ON_A_MATRIX[code](layer.dequantize()), found) > SAME_SUMS


@pytest.mark.parametrize("code", ON_VALUES)
def test_other_code_gets_the_values(code):
    layer = experts()
    found, expected = (ON_VALUES[code](w) for w in (PackedTensor(layer), layer.dequantize()))
    assert type(found) is torch.Tensor
    assert worst_sqnr(expected, found) > SAME_SUMS


def test_a_parameter_stored_with_inputs_first_is_read_that_way():
    layer = experts()
    weight = PackedTensor(layer, is_transposed=True)
    assert weight.shape == (E, IN, OUT)
    assert torch.equal(weight + 0, layer.dequantize().mT)
    assert torch.equal(weight[NUMBERS] + 0, layer.dequantize().mT[NUMBERS])
    assert torch.equal(torch.bmm(X.expand(E, -1, -1), weight), layer(X.expand(E, -1, -1)))


def test_an_expert_that_does_not_exist_is_an_error():
    weight = PackedTensor(experts())
    with pytest.raises(IndexError):
        weight[E]
    with pytest.raises(IndexError, match="an expert outside of 0 to 3"):
        weight[torch.tensor([0, E])]


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(E, IN, OUT))
        self.other = nn.Parameter(torch.randn(OUT, IN))

    def forward(self, x):
        return x @ self.table @ self.other


def packed_mixture():
    model = Mixture().eval()
    table, other = hand_over(model, "table"), hand_over(model, "other")
    model.packed_table = PackedParameter.of(experts(), True)
    model.packed_other = PackedParameter.of(matrix(), False)
    return model, table, other


def test_the_module_of_a_packed_parameter_keeps_its_class_and_can_be_copied():
    model, table, _ = packed_mixture()
    assert isinstance(model, Mixture)
    assert type(model).__name__ == "Mixture"
    assert table.weight.shape == model.table.shape
    assert list(model.parameters()) == []
    expected = model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), expected)
        assert other.packed_table is not model.packed_table
        assert other.table.layer is other.packed_table.layer
    assert model.bfloat16().table.dtype == torch.bfloat16
    assert worst_sqnr(expected, model(X.bfloat16()).float()) > 30


def test_gradients_pass_to_the_input():
    model, _, _ = packed_mixture()
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    expected = (model.packed_table.dequantize() @ model.packed_other.dequantize()).sum((0, 2))
    assert worst_sqnr(expected.expand_as(x), x.grad) > SAME_SUMS


def test_the_weight_of_a_layer_is_multiplied_on_its_integers_without_its_bias(dequantized):
    layer = matrix().with_bias(torch.ones(OUT))
    weight, batch = layer.weight, X.expand(3, -1, -1)
    found = F.linear(X, weight, torch.zeros(OUT))
    assert torch.equal(found, layer.without_bias()(X))
    assert torch.equal(batch @ weight.mT, layer.without_bias()(batch))
    assert (weight.shape, weight.dtype) == (torch.Size((OUT, IN)), torch.float32)
    assert not dequantized
    assert torch.equal(weight + 0, layer.dequantize())


def test_a_repeated_matrix_has_its_values_where_something_else_is_done_with_it():
    layer = matrix()
    weight = layer.weight
    with torch._C.DisableTorchFunctionSubclass():  # as inside of torch's functions
        repeated = weight.t().expand(3, IN, OUT)
        other = repeated * 2
        product = torch.bmm(X.expand(3, -1, -1), repeated)
        fewer = torch.bmm(X.expand(3, -1, -1)[:, :, :8], repeated[:, :8])
    assert torch.equal(other, weight.t().expand(3, IN, OUT) * 2)
    assert worst_sqnr(X.expand(3, -1, -1) @ layer.dequantize().mT, product) > SAME_SUMS
    assert fewer.shape == (3, len(X), OUT)
