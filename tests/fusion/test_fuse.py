"""What `fuse` fuses, what it leaves alone, and that both compute the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant.errors import OptionError
from fxquant.fusion.fused import fused_nodes
from fxquant.kernels.attention import attention
from fxquant.kernels.norm import add_and_norm, norm
from fxquant.modules.fused_linear import FusedLinear
from fxquant.modules.gated_linear import GatedLinear
from tests import zoo

WIDTH = 64


def quantized(model, x, **options):
    options = {"group_size": 32, "method": "rtn", "accuracy_warning": "ignore", **options}
    return fxquant.quantize(model.eval(), example_inputs=x, **options)[0]


def first(output):
    return output if isinstance(output, torch.Tensor) else first(output[0])


def kinds(gm):
    """How many of each fused node a graph has."""
    targets = [node.target for node in gm.graph.nodes]
    layers = [m for m in gm.modules() if isinstance(m, FusedLinear)]
    return {
        "attention": targets.count(attention),
        "layers": sorted(len(m.sizes) for m in layers if len(m.sizes) > 1),
        "functions": sum(m.function != "none" for m in layers),
        "norms": targets.count(norm) + targets.count(add_and_norm),
        "gates": sum(isinstance(m, GatedLinear) for m in gm.modules()),
    }


def counts(attention, layers, functions, norms, gates=0):
    return {"attention": attention, "layers": layers, "functions": functions, "norms": norms,
            "gates": gates}  # fmt: skip


ZOO = {
    "bert": counts(2, [3, 3], 3, 5),  # its pooler has a tanh
    "gpt2": counts(2, [], 2, 5),  # its projection is one layer already
    "llama": counts(2, [3, 3], 0, 5, gates=2),
    "vit": counts(2, [3, 3], 3, 5),
    "whisper": counts(6, [2, 2, 3, 3, 3, 3], 4, 12),
    "gemma2": counts(0, [3, 3], 0, 0, gates=2),  # scores capped by tanh, norms with 1 + weight
}
CASES = [
    *((name, torch.float32) for name in ZOO),
    *((n, torch.bfloat16) for n in ("bert", "llama")),
]


@pytest.mark.parametrize(("name", "dtype"), CASES, ids=str)
def test_architectures(name, dtype, tmp_path, float32_products):
    torch.manual_seed(0)
    model, inputs = zoo.build(name, dtype), zoo.inputs(name)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    plain, _ = fxquant.quantize(model, [inputs], group_size=32, accuracy_warning="ignore")
    before = str(plain.graph)
    fused = fxquant.fuse(plain)
    assert kinds(fused) == ZOO[name]
    assert str(plain.graph) == before
    with torch.no_grad():
        expected, found = first(plain(**inputs)), first(fused(**inputs))
        float_output = first(model(**inputs)) if dtype == torch.bfloat16 else expected
    if dtype == torch.float32:
        assert fxquant.sqnr_db(expected, found) > 100
    else:
        # Both round alike: neither is farther from the other than quantization moved them.
        assert fxquant.sqnr_db(expected, found) > fxquant.sqnr_db(float_output, expected) + 6
    fxquant.save_model(fused, tmp_path / "fused.safetensors")
    loaded = fxquant.load_model(tmp_path / "fused.safetensors")
    for other in (loaded, copy.deepcopy(fused), fxquant.fuse(fused)):
        with torch.no_grad():
            assert torch.equal(first(other(**inputs)), found)
    assert kinds(loaded) == ZOO[name]


def test_repeated_keys_are_read_once():
    torch.manual_seed(0)
    inputs = zoo.inputs("llama")
    plain, _ = fxquant.quantize(zoo.build("llama"), [inputs], group_size=32,
                                accuracy_warning="ignore")  # fmt: skip
    fused = fxquant.fuse(plain)
    expands = [sum("expand" in n.name for n in gm.graph.nodes) for gm in (plain, fused)]
    assert expands[0] - expands[1] == 4  # keys and values of two layers


class Projections(nn.Module):
    """Three layers that read one value, and what happens to their outputs."""

    def __init__(self, use, **options):
        super().__init__()
        self.q = nn.Linear(WIDTH, 32)
        self.k = nn.Linear(WIDTH, 96, **options)
        self.v = nn.Linear(WIDTH, 40)
        self.use = use

    def forward(self, x):
        return self.use(self, x)


def test_outputs_have_the_same_bits():
    x = torch.randn(2, 5, WIDTH)
    model = Projections(lambda m, x: torch.cat([m.q(x) * 2, m.k(x).view(10, 96).view(2, 5, 96),
                                                m.v(x) + 1], -1))  # fmt: skip
    plain = quantized(model, x)
    fused = fxquant.fuse(plain)
    assert kinds(fused)["layers"] == [3]
    assert torch.equal(plain(x), fused(x))
    assert torch.equal(fused.to(torch.bfloat16)(x.bfloat16()), plain.bfloat16()(x.bfloat16()))
    assert fused.q_k_v.linear.bits == 4


@pytest.mark.parametrize("activation_bits", [None, 8])
def test_layers_of_several_formats_are_joined_by_format(activation_bits):
    x = torch.randn(2, 5, WIDTH)
    model = Projections(lambda m, x: (m.q(x).sum(-1), m.k(x).sum(-1), m.v(x).sum(-1)))
    bits = {"q": 4, "k": 8, "v": 4}
    plain = quantized(model, x, bits=bits, activation_bits=activation_bits)
    fused = fxquant.fuse(plain)
    assert kinds(fused)["layers"] == [2]
    for one, other in zip(plain(x), fused(x), strict=True):
        assert torch.equal(one, other)


def in_place(m, x):
    q = m.q(x)
    q.mul_(2)
    return q + 0, m.k(x) * 2


def input_changes(m, x):
    y = x * 1
    q = m.q(y) * 2
    y.add_(1)
    return q, m.k(y) * 2


def through_a_view(m, x):
    q = m.q(x)
    q.transpose(0, 1).add_(1)
    return q * 2, m.k(x) * 2


LEFT_ALONE = {
    "outputs of the model": lambda m, x: (m.q(x), m.k(x)),
    "other inputs": lambda m, x: (m.q(x) * 2, m.k(x + 1) * 2),
    "written in place": in_place,
    "written through a view": through_a_view,
    "an input that changes": input_changes,
    "one layer read twice": lambda m, x: m.q(x) + m.q(x),
    "strides are read": lambda m, x: (m.q(x).as_strided((4,), (1,)), m.k(x).as_strided((4,), (1,))),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_layers_that_are_left_alone(name):
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Projections(LEFT_ALONE[name]), x)
    fused = fxquant.fuse(plain)
    assert fused_nodes(fused) == []
    assert all(torch.equal(a, b) for a, b in zip(plain(x), fused(x), strict=True))


class Tied(nn.Module):
    """Two projections of embedded tokens, and a head that may share the embedding's table."""

    def __init__(self, is_tied):
        super().__init__()
        self.table = nn.Embedding(96, 64)
        self.one, self.other = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head, self.last = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        y = torch.tanh(self.one(x)) + self.other(x)
        return self.head(y) * 2, self.last(y) * 2


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_quantized_embedding_keeps_the_layer_that_shares_its_table_apart(is_tied):
    torch.manual_seed(0)
    ids = torch.arange(12).view(2, 6)
    graph = quantized(Tied(is_tied).eval(), ids, embeddings=8, bits=8)
    fused = fxquant.fuse(graph)
    for one, y in zip(fused(ids), graph(ids), strict=True):
        assert torch.equal(one, y)
    assert kinds(fused)["layers"] == ([2] if is_tied else [2, 2])


def test_layers_with_hooks_are_left_alone():
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Projections(lambda m, x: (m.q(x) * 2, m.k(x) * 2, m.v(x) * 2)), x)
    plain.k.register_forward_hook(lambda module, args, output: output + 1)
    fused = fxquant.fuse(plain)
    assert kinds(fused)["layers"] == []  # the hook could have changed what `v` reads
    assert all(torch.equal(a, b) for a, b in zip(plain(x), fused(x), strict=True))


class Attends(nn.Module):
    def __init__(self, use):
        super().__init__()
        self.fc, self.use = nn.Linear(WIDTH, WIDTH), use

    def forward(self, x):
        return self.use(self, self.fc(x).unflatten(-1, (4, 16)).transpose(1, 2))


ATTENTION_LEFT_ALONE = {
    "dropout": lambda m, y: F.scaled_dot_product_attention(y, y, y, dropout_p=0.5) * 0,
    "dropout of the mode": lambda m, y: F.scaled_dot_product_attention(
        y, y, y, dropout_p=0.1 if m.training else 0.0
    ),
    "written in place": lambda m, y: F.scaled_dot_product_attention(y, y, y).add_(1),
}


def test_dropout_that_is_active_is_left_alone():
    x = torch.randn(2, 5, WIDTH)
    fused = fxquant.fuse(quantized(Attends(ATTENTION_LEFT_ALONE["dropout"]), x))
    assert kinds(fused)["attention"] == 0


def test_dropout_of_a_model_in_evaluation_mode_is_none():
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Attends(ATTENTION_LEFT_ALONE["dropout of the mode"]), x)
    fused = fxquant.fuse(plain)
    assert kinds(fused)["attention"] == 0  # the graph returns it


def test_attention_that_is_written_into_is_left_alone():
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Attends(ATTENTION_LEFT_ALONE["written in place"]), x)
    assert kinds(fxquant.fuse(plain))["attention"] == 0


def test_a_view_of_attention_stays_a_view_of_the_same_values():
    x = torch.randn(2, 5, WIDTH)

    def use(m, y):
        return (
            F.scaled_dot_product_attention(y, y, y).transpose(1, 2).reshape(2, 5, 64).view(-1)[1:]
            * 1
        )

    plain = quantized(Attends(use), x)
    fused = fxquant.fuse(plain)
    assert kinds(fused)["attention"] == 1
    assert fxquant.sqnr_db(plain(x), fused(x)) > 100


def test_diff_shows_what_was_fused():
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Projections(lambda m, x: (m.q(x) * 2, m.k(x) * 2, m.v(x) * 2)), x)
    changes = {c.node: c for c in fxquant.diff(plain, fxquant.fuse(plain)).changes}
    assert changes["q_k_v"].status == "added"
    assert changes["q_k_v"].after == "FusedLinear"
    assert changes["k"].status == "rewritten"
    assert changes["k"].before.startswith("QuantizedLinearInt4")


def test_who_needs_the_plain_graph_says_so():
    model, inputs = zoo.build("bert"), zoo.inputs("bert")
    plain, _ = fxquant.quantize(model, [inputs], group_size=32, accuracy_warning="ignore")
    fused = fxquant.fuse(plain)
    with pytest.raises(OptionError, match="fused graph"):
        fxquant.swap_modules(model, fused)
    findings = fxquant.check_export(fused, "compressed-tensors")
    assert {finding.where for finding in findings} == set(fused_nodes(fused))
    assert fxquant.check_export(fused, "pt2") == []


def test_memory_is_its_own_unless_it_is_shared():
    x = torch.randn(2, 5, WIDTH)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    plain = quantized(model, x)
    weight = plain.get_parameter("1.weight").data_ptr()
    assert fxquant.fuse(plain).get_parameter("1.weight").data_ptr() != weight
    shared = fxquant.fuse(plain, share_memory=True)
    assert shared.get_parameter("1.weight").data_ptr() == weight
    assert shared.get_parameter("1.weight") is not plain.get_parameter("1.weight")


def test_a_file_cannot_ask_for_other_sizes(tmp_path):
    x = torch.randn(2, 5, WIDTH)
    plain = quantized(Projections(lambda m, x: (m.q(x) * 2, m.k(x) * 2, m.v(x) * 2)), x)
    fused = fxquant.fuse(plain)
    fused.q_k_v.sizes = (32, 96, 41)
    with pytest.raises(fxquant.SaveError):
        fxquant.save_model(fused, tmp_path / "fused.safetensors")


def test_only_graphs_can_be_fused():
    with pytest.raises(OptionError):
        fxquant.fuse(nn.Linear(2, 2))
