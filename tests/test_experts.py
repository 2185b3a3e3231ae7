"""Fused experts from the graph to the file: 3-D parameters in every product that models use."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import WeightError
from fxquant.graph.grouped_matmul import grouped_matmul
from fxquant.modules.grouped_linear import GroupedLinear

E, W, H = 4, 64, 96


class Experts(nn.Module):
    """Two of four experts for each row; subclasses multiply."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(W, E)
        self.up = nn.Parameter(torch.randn(E, H, W) / 8)
        self.down = nn.Parameter(torch.randn(E, W, H) / 10)

    def forward(self, x):
        chosen = self.router(x).softmax(-1).topk(2, -1)
        rows = x.repeat_interleave(2, 0)
        made = self.multiply(rows, chosen.indices.flatten())
        return (made.unflatten(0, (-1, 2)) * chosen.values[..., None]).sum(1)


class Numbers(Experts):
    def multiply(self, rows, numbers):
        h = torch.bmm(self.up[numbers], rows.unsqueeze(-1)).squeeze(-1)
        h = torch.relu(h)
        return torch.bmm(h.unsqueeze(1), self.down.transpose(1, 2)[numbers]).squeeze(1)


class Turned(Experts):
    def multiply(self, rows, numbers):
        h = torch.relu(torch.bmm(rows.unsqueeze(1), self.up[numbers].mT))
        return torch.bmm(h, self.down[numbers].adjoint()).squeeze(1)


class Sorted(Experts):
    def multiply(self, rows, numbers):
        order = numbers.argsort()
        ends = torch.cumsum(F.one_hot(numbers, E).sum(0), 0)
        h = torch.relu(grouped_matmul(rows[order], self.up.transpose(1, 2), ends))
        made = grouped_matmul(h, self.down.transpose(1, 2), ends)
        return torch.zeros_like(rows).index_copy(0, order, made)


class Dense(Experts):
    def multiply(self, rows, numbers):
        h = torch.relu(torch.bmm(rows.expand(E, -1, -1), self.up.transpose(1, 2)))
        made = torch.matmul(h, self.down.mT)
        return (made * F.one_hot(numbers, E).T[..., None].to(rows.dtype)).sum(0)


KINDS = [Numbers, Turned, Sorted, Dense]
DATA = [torch.randn(40, W, generator=torch.Generator().manual_seed(i)) for i in range(6)]
OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_experts_are_quantized_saved_and_loaded(kind, method, tmp_path):
    model = kind().eval()
    graph = fxquant.trace(model, (DATA[0],))
    layers = {n: m for n, m in graph.named_modules() if isinstance(m, GroupedLinear)}
    assert set(layers) == {"up", "down"}
    assert torch.equal(layers["up"].weight, model.up)
    assert torch.allclose(graph(DATA[1]), model(DATA[1]), atol=1e-5)
    qmodel, info = fxquant.quantize(model, DATA, method=method, **OPTIONS)
    actions = {d.module: d.action for d in info.decisions}
    assert actions["up"] == actions["down"] == "int4"
    rows = {row.module: row for row in info.rows}
    assert rows["up"].weight_sqnr_db > 16
    assert rows["down"].introduced_sqnr_db > 16
    fxquant.save_model(qmodel, tmp_path / "m.safetensors", info)
    loaded = fxquant.load_model(tmp_path / "m.safetensors")
    assert torch.equal(loaded(DATA[0]), qmodel(DATA[0]))
    floats = fxquant.dequantize_model(qmodel)
    assert isinstance(floats.up, GroupedLinear)


def test_each_expert_is_fitted_to_the_rows_routed_to_it():
    """Inputs of the first expert differ from those of the others, so its best integers do."""
    torch.manual_seed(1)
    model = Numbers().eval()
    mixing = torch.randn(4, W)
    data = [torch.randn(300, 4) @ mixing + 0.1 * torch.randn(300, W) for _ in range(4)]
    errors = {}
    for method in ("rtn", "gptq"):
        _, info = fxquant.quantize(model, data, method=method, **OPTIONS)
        errors[method] = {r.module: r.introduced_sqnr_db for r in info.rows}["up"]
    assert errors["gptq"] > errors["rtn"] + 1


def test_an_expert_without_tokens_falls_back_and_the_record_says_so():
    model = Numbers().eval()
    model.router.weight.data.zero_()
    model.router.bias.data = torch.tensor([3.0, 2.0, -9.0, -9.0])
    _, info = fxquant.quantize(model, DATA, method="gptq", **OPTIONS)
    reason = next(d.reason for d in info.decisions if d.module == "up")
    assert "2 of 4 experts got no calibration token: rounded to nearest" in reason
    assert "Give more rows" in next(w for w in info.warnings if w.startswith("experts of layers"))


@pytest.mark.parametrize("method", ["local", "gradient", "exact"])
def test_sensitivity_measures_experts(method):
    report = fxquant.sensitivity(
        Sorted().eval(), DATA, method=method, rounding="rtn", group_size=32, skip_param_threshold=0
    )
    rows = {row.module: row for row in report.rows}
    assert rows["up"].params == E * H * W
    assert rows["up"].weight_sqnr_db > 16
    if method != "local":
        assert 10 < rows["up"].output_sqnr_db < 40


def test_an_expert_with_nan_is_named():
    model = Numbers().eval()
    model.up.data[2, 3, 4] = float("nan")
    with pytest.raises(WeightError, match=r"up\.weight.*1 of"):
        fxquant.quantize(model, DATA, **OPTIONS)


class OneByOne(Experts):
    """Each expert's own product, with the matrices stored the other way round."""

    def __init__(self):
        super().__init__()
        self.up.data = self.up.data.mT.contiguous()

    def multiply(self, rows, numbers):
        made = torch.zeros(len(rows), W)
        for i in range(E):
            chosen = (numbers == i)[:, None]
            h = torch.relu(rows @ self.up[i])
            made = torch.where(chosen, F.linear(h, self.down[i]), made)
        return made


@pytest.mark.parametrize("kind", [*KINDS, OneByOne])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_swapped_copy_has_packed_experts(kind, method, tmp_path):
    model = kind().eval()
    qmodel, info = fxquant.quantize(model, DATA, method=method, **OPTIONS)
    copy = fxquant.swap_modules(model, qmodel)
    assert copy.fxquant_left_float == []
    assert isinstance(copy, kind)
    assert not {"up", "down"} & {name for name, _ in copy.named_parameters()}
    assert copy.up.shape == model.up.shape
    assert torch.equal(copy(DATA[0]), qmodel(DATA[0]))
    fxquant.save_model(qmodel, tmp_path / "m.safetensors", info)
    other = fxquant.load_into(kind().eval(), tmp_path / "m.safetensors")
    assert torch.equal(other(DATA[0]), qmodel(DATA[0]))
    assert torch.equal(fxquant.trace(copy, (DATA[0],))(DATA[1]), copy(DATA[1]))


class ReadTwice(Numbers):
    def forward(self, x):
        return super().forward(x) + self.up.mean()


class HasTheName(Numbers):
    packed_up = "taken"


class Half(OneByOne):
    """Of one parameter only some matrices are multiplied with."""

    def multiply(self, rows, numbers):
        return F.linear(torch.relu(rows @ self.up[1]), self.down[2]) + numbers[:, None]


@pytest.mark.filterwarnings("ignore::fxquant.swap.LeftFloatWarning")
@pytest.mark.parametrize(
    ("kind", "float_in"), [(ReadTwice, {"up"}), (Half, {"up", "down"}), (HasTheName, {"up"})]
)
def test_a_parameter_that_is_not_all_weight_stays_float_in_a_swapped_copy(kind, float_in):
    model = kind().eval()
    qmodel, _ = fxquant.quantize(model, DATA, **OPTIONS)
    copy = fxquant.swap_modules(model, qmodel)
    kept = {name: p for name, p in copy.named_parameters() if name in ("up", "down")}
    assert kept.keys() == float_in
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in kept.items())


@pytest.mark.parametrize(
    ("observer", "how"),
    [("minmax", "static 8-bit activations, simulated"),
     ("dynamic", "dynamic 8-bit activations, integers")],
)  # fmt: skip
def test_inputs_of_experts_are_rounded_and_the_record_says_how(observer, how):
    model = Dense().eval()
    plain, _ = fxquant.quantize(model, DATA, method="rtn", **OPTIONS)
    q, info = fxquant.quantize(
        model, DATA, method="rtn", activation_bits=8, observer=observer, **OPTIONS
    )
    reasons = {d.module: d.reason for d in info.decisions if d.bits}
    assert {"up", "down"} <= set(reasons)
    assert all(reason.endswith(how) for reason in reasons.values())
    assert 20 < fxquant.sqnr_db(plain(DATA[0]), q(DATA[0])) < 60
