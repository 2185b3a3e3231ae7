"""Functions behind linear layers, and norms with the addition before them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.fusion.fused import fused_nodes
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.modules.fused_linear import FusedLinear

WIDTH = 64


class Uses(nn.Module):
    """A linear layer, norms, and what a test makes of them."""

    def __init__(self, use, **parts):
        super().__init__()
        self.fc, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)
        for name, part in parts.items():
            self.add_module(name, part)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def both(use, **parts):
    """A quantized graph, and the same fused; their outputs were compared."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, WIDTH)
    plain, _ = fxquant.quantize(Uses(use, **parts).eval(), example_inputs=x, group_size=32,
                                accuracy_warning="ignore")  # fmt: skip
    fused = fxquant.fuse(plain)
    with torch.no_grad():
        pairs = zip(torch.utils._pytree.tree_leaves(plain(x)),
                    torch.utils._pytree.tree_leaves(fused(x)), strict=True)  # fmt: skip
        assert all(torch.equal(a, b) or fxquant.sqnr_db(a, b) > 100 for a, b in pairs)
    return fused


def functions(gm):
    return [m.function for m in gm.modules() if isinstance(m, FusedLinear)]


def calls(gm, target):
    return [node.target for node in gm.graph.nodes].count(target)


def written_out(x):
    cubic = x + 0.044715 * torch.pow(x, 3.0)
    return 0.5 * x * (1.0 + torch.tanh(0.7978845608028654 * cubic))


FUSED = {
    "gelu": lambda m, x: F.gelu(m.fc(x)),
    "gelu_tanh": lambda m, x: F.gelu(m.fc(x), approximate="tanh"),
    "relu": lambda m, x: m.fc(x).relu(),
    "silu": lambda m, x: F.silu(m.fc(x)),
    "tanh": lambda m, x: torch.tanh(m.fc(x)),
}
MODULES = {
    "gelu": nn.GELU(), "gelu_tanh": nn.GELU("tanh"), "relu": nn.ReLU(), "silu": nn.SiLU(),
    "tanh": nn.Tanh(),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_functions_and_modules(name, tmp_path):
    fused = both(FUSED[name])
    assert functions(fused) == [name]
    assert functions(both(lambda m, x: m.act(m.fc(x)), act=MODULES[name])) == [name]
    fxquant.save_model(fused, tmp_path / "fused.safetensors")
    loaded = fxquant.load_model(tmp_path / "fused.safetensors")
    x = torch.randn(3, 4, WIDTH)
    assert torch.equal(loaded(x), fused(x))


def test_through_views_and_written_out():
    assert functions(both(lambda m, x: written_out(m.fc(x).view(10, 64)))) == ["gelu_tanh"]
    assert functions(both(lambda m, x: F.gelu(m.fc(x).view(10, 64)).view(2, 5, 64))) == ["gelu"]


LEFT_ALONE = {
    "read twice": lambda m, x: (lambda y: F.gelu(y) + y)(m.fc(x)),
    "returned": lambda m, x: (lambda y: (F.gelu(y), y))(m.fc(x)),
    "in place": lambda m, x: F.relu(m.fc(x), inplace=True),
    "another function": lambda m, x: F.elu(m.fc(x)),
    "another constant": lambda m, x: (lambda y: 0.5 * y * (1 + torch.tanh(0.7 * y)))(m.fc(x)),
    "a part": lambda m, x: F.gelu(m.fc(x)[..., :32]),
    "called twice": lambda m, x: F.gelu(m.fc(x)) + F.gelu(m.fc(x + 1)),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_functions_that_are_left_alone(name):
    assert functions(both(LEFT_ALONE[name])) == []


def test_a_function_with_a_hook_is_left_alone():
    model = Uses(lambda m, x: m.act(m.fc(x)), act=nn.GELU())
    plain, _ = fxquant.quantize(model.eval(), example_inputs=torch.randn(2, WIDTH), group_size=32,
                                accuracy_warning="ignore")  # fmt: skip
    plain.act.register_forward_hook(lambda module, args, output: output * 2)
    assert fused_nodes(fxquant.fuse(plain)) == []


def rms(x, weight):
    y = x.to(torch.float32)
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * y.to(x.dtype)


@pytest.mark.parametrize(
    ("use", "norms", "sums"),
    [
        (lambda m, x: m.norm(m.fc(x) + x), 1, 0),
        (lambda m, x: F.layer_norm(m.fc(x) + x, (WIDTH,), m.weight, None, 1e-6), 1, 0),
        (lambda m, x: (lambda s: s + m.norm(s))(m.fc(x) + x), 0, 1),
        (lambda m, x: rms(m.fc(x), m.weight), 1, 0),
        (lambda m, x: rms(m.fc(x) + x, m.weight), 1, 0),
        (lambda m, x: (lambda s: s + rms(s, m.weight))(m.fc(x) + x), 0, 1),
        (lambda m, x: m.norm(m.fc(x) + x[:, :1]), 1, 0),  # it broadcasts: torch's ops
        (lambda m, x: m.norm(m.fc(x)), 0, 0),
        (lambda m, x: m.norm(torch.add(m.fc(x), x, alpha=2)), 0, 0),
        (lambda m, x: m.norm(m.fc(x) + 1), 0, 0),
        (lambda m, x: (lambda s: (s.mul_(2), m.norm(s))[1])(m.fc(x) + x), 0, 0),
        (lambda m, x: m.plain(m.fc(x) + x), 0, 0),
        (lambda m, x: m.rms(m.fc(x)), 1, 0),
        (lambda m, x: m.rms(m.fc(x) + x), 1, 0),
        (lambda m, x: (lambda s: s + m.rms(s))(m.fc(x) + x), 0, 1),
        (lambda m, x: F.rms_norm(m.fc(x), (WIDTH,), m.weight, 1e-5), 1, 0),
        (lambda m, x: F.rms_norm(m.fc(x), (WIDTH,), m.weight), 0, 0),  # eps depends on the dtype
        (lambda m, x: F.rms_norm(m.fc(x), (5, WIDTH), eps=1e-5), 0, 0),
    ],
)
def test_norms(use, norms, sums, tmp_path):
    parts = {"plain": nn.LayerNorm(WIDTH, elementwise_affine=False), "rms": nn.RMSNorm(WIDTH, 1e-5)}
    fused = both(use, **parts)
    assert (calls(fused, norm), calls(fused, add_and_norm)) == (norms, sums)
    fxquant.save_model(fused, tmp_path / "fused.safetensors")
    x = torch.randn(3, 5, WIDTH)
    with torch.no_grad():
        assert torch.equal(fxquant.load_model(tmp_path / "fused.safetensors")(x), fused(x))


def test_a_fused_graph_can_be_moved_trained_and_exported():
    fused = both(lambda m, x: m.norm(F.gelu(m.fc(x)) + x))
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        expected = fused(x)
        program = torch.export.export(fused, (x,))
        assert fxquant.sqnr_db(expected, program.module()(x)) > 100
    x.requires_grad_()
    fused(x).sum().backward()
    assert x.grad.isfinite().all()
    with torch.no_grad():
        found = fused.to(torch.bfloat16)(x.bfloat16())
    assert fxquant.sqnr_db(expected, found.float()) > 30
