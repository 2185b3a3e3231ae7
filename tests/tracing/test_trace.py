import copy

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import OptionError, TraceError
from fxquant.graph.layers import sites
from fxquant.modules.linear import QuantizedLinear
from fxquant.numerics.metrics import sqnr_db
from tests import models
from tests.awkward import CASES
from tests.awkward.registry import run
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)


class AttentionAndIdle(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.idle = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        return self.attention(x, y, y)[0]


def linear_names(gm):
    return [s.name for s in sites(gm) if isinstance(s.module, nn.Linear)]


def quantized_and_used(model, *inputs, **kwargs):
    """Quantize all linear layers and make sure that each one's weight reaches the output."""
    example = kwargs or inputs
    q, info = fxquant.static_quantize(
        model, [example], group_size=32, skip_param_threshold=0, skip_layer_names=[],
        accuracy_warning="ignore",
    )  # fmt: skip
    model.eval()
    with torch.no_grad():
        before = fxquant.graph.structures.main_output(q(*inputs, **kwargs))
        expected = fxquant.graph.structures.main_output(model(*inputs, **kwargs))
        assert sqnr_db(expected, before) > 12
        for site in sites(q):
            if isinstance(site.module, QuantizedLinear):
                state = {k: v.clone() for k, v in site.module.state_dict().items()}
                site.module.load_state_dict({**state, "_scales": 3 * state["_scales"]})
                changed = fxquant.graph.structures.main_output(q(*inputs, **kwargs))
                assert not torch.equal(changed, before), f"{site.name} is not on the path"
                site.module.load_state_dict(state)
    return q, info


def test_a_plain_model_is_traced_symbolically_and_not_changed():
    model = models.Plain().train()
    state = copy.deepcopy(model.state_dict())
    gm = fxquant.trace(model)
    assert model.training
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    model.eval()
    assert torch.equal(gm(X), model(X))
    report = fxquant.trace_report(gm)
    assert (report.way, report.coverage, report.opaque) == ("symbolic", 1.0, [])
    assert linear_names(gm) == ["first", "second"]


@pytest.mark.parametrize("example", [None, X], ids=["no example", "example"])
def test_control_flow_in_a_child_leaves_it_opaque_and_its_linears_reachable(example):
    model = models.BranchInChild().eval()
    gm = fxquant.trace(model, example)
    report = fxquant.trace_report(gm)
    assert [(o.module, o.type) for o in report.opaque] == [("child", "BranchingChild")]
    assert "control flow" in report.opaque[0].reason
    assert report.coverage == 1.0
    assert sorted(linear_names(gm)) == ["child.block.0", "child.block.2", "child.fc", "head"]
    for sign in (1, -1):
        assert torch.equal(gm(sign * X), model(sign * X))
    quantized_and_used(model, X if model.child.fc(X).sum() > 0 else -X)


def test_control_flow_in_the_root_leaves_one_opaque_node():
    model = models.BranchingChild().eval()
    gm = fxquant.trace(model)
    report = fxquant.trace_report(gm)
    assert (report.way, report.coverage) == ("opaque", 1.0)
    assert [o.module for o in report.opaque] == ["model"]
    assert sorted(linear_names(gm)) == ["block.0", "block.2", "fc"]
    assert torch.equal(gm(X), model(X))
    quantized_and_used(model, X if model.fc(X).sum() > 0 else -X)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_transformer_encoder_is_quantized_past_its_fast_path(norm_first, batch_first):
    layer = nn.TransformerEncoderLayer(
        WIDTH, 4, 96, norm_first=norm_first, batch_first=batch_first, dropout=0.1
    )
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    _, info = quantized_and_used(model, X)
    names = ["self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2"]
    assert info.selected_layers == [f"layers.{i}.{name}" for i in range(2) for name in names]


def test_masks_of_a_transformer_encoder_keep_their_meaning():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 96, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[:, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    inputs = {"src": X, "mask": causal, "src_key_padding_mask": padding}
    gm = fxquant.trace(model, inputs)
    with torch.no_grad():
        assert torch.allclose(gm(**inputs), model(**inputs), atol=1e-5)
        assert not torch.allclose(gm(**inputs), model(X), atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [{}, {"batch_first": True}, {"bias": False}, {"kdim": 48, "vdim": 48}],
    ids=["packed", "batch first", "no bias", "other widths"],
)
def test_multihead_attention_with_another_memory(options):
    model = models.CrossAttention(**options).eval()
    memory = torch.randn(3, 5, options.get("kdim", WIDTH))
    gm = fxquant.trace(model, (X, memory))
    for found, expected in zip(gm(X, memory), model(X, memory), strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
    _, info = quantized_and_used(model, X, memory)
    assert len(info.selected_layers) == 4


def test_a_module_called_twice_is_quantized_once():
    q, info = quantized_and_used(models.CalledTwice(), X)
    assert info.selected_layers == ["fc"]
    assert len({id(s.module) for s in sites(q)}) == 1


def test_tied_weights_stay_tied_and_are_protected_by_default():
    model = models.Tied().eval()
    tokens = torch.randint(0, 50, (4, 7))
    gm = fxquant.trace(model, tokens)
    assert gm.embedding.weight is gm.decoder.weight
    q, info = fxquant.static_quantize(
        model, [tokens], group_size=32, accuracy_warning="ignore", num_calibration_samples=4
    )
    assert q.embedding.weight is q.decoder.weight
    row = next(d for d in info.decisions if d.module == "decoder")
    assert (row.action, row.rule) == ("float", "default: tied weight")
    assert "embedding" in row.reason
    bytes_of = sum({p.data_ptr(): p.numel() * 4 for p in model.parameters()}.values())
    assert info.original_size_mb == pytest.approx(bytes_of / 1e6)
    both, _ = fxquant.static_quantize(
        model, [tokens], group_size=32, accuracy_warning="ignore", skip_layer_names=[]
    )
    assert isinstance(both.decoder, fxquant.QuantizedLinearInt4)
    assert model.decoder.weight is model.embedding.weight


def test_linears_on_bare_parameters_become_nodes_named_after_them():
    model = models.BareParameters().eval()
    gm = fxquant.trace(model, X)
    assert linear_names(gm) == ["kernel", "matrix", "model"]
    assert torch.allclose(gm(X), model(X), atol=1e-5)
    assert fxquant.trace_report(gm).coverage == 1.0
    quantized_and_used(model, X)


def test_keywords_flags_and_named_outputs_come_through():
    model = models.Named().eval()
    inputs = {"x": X, "scale": torch.tensor(0.5), "double": True}
    gm = fxquant.trace(model, inputs)
    found, expected = gm(**inputs), model(**inputs)
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["pair"][1][0], expected["pair"][1][0])
    with pytest.raises(TraceError, match="'double'.*False.*True.*Trace the model again"):
        gm(**{**inputs, "double": False})
    quantized_and_used(model, **inputs)


def test_an_optional_argument_is_kept_only_if_the_example_has_it():
    model = models.NoneCheck().eval()
    mask = torch.rand(3, 5, WIDTH)
    assert torch.equal(fxquant.trace(model)(X), model(X))
    assert torch.equal(fxquant.trace(model, X)(X), model(X))
    assert torch.equal(fxquant.trace(model, (X, mask))(X, mask), model(X, mask))


def test_a_graph_that_holds_for_some_lengths_only_says_so():
    model = models.LengthBranch().eval()
    long = torch.randn(2, 12, WIDTH)
    gm = fxquant.trace(model, long)
    assert torch.allclose(gm(long), model(long))
    try:
        found = gm(X)
    except AssertionError as error:
        assert "x.size()[1] > 8" in str(error)
    else:
        assert torch.allclose(found, model(X))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_stay_narrow(dtype):
    model = models.Plain().to(dtype)
    q, _ = quantized_and_used(model, X.to(dtype))
    assert q(X.to(dtype)).dtype == dtype


def test_parametrized_weights_are_read_once_and_the_model_keeps_its_own():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)))
    gm = fxquant.trace(model)
    assert torch.allclose(gm(X), model(X), atol=1e-6)
    assert nn.utils.parametrize.is_parametrized(model[0])
    model[0].parametrizations.weight.original0.data.mul_(2)
    assert not torch.allclose(gm(X), model(X))


def test_a_linear_alone_is_a_model():
    model = nn.Linear(WIDTH, WIDTH)
    gm = fxquant.trace(model)
    assert linear_names(gm) == ["model"]
    assert torch.equal(gm(X), model(X))


def test_inputs_that_do_not_fit_are_named():
    with pytest.raises(TraceError, match=r"Plain\.forward.*example inputs.*Check the shapes"):
        fxquant.trace(models.Plain(), torch.randn(3, 7))
    with pytest.raises(TraceError, match="unexpected keyword argument 'z'"):
        fxquant.trace(models.Plain(), {"x": X, "z": X})
    with pytest.raises(OptionError, match=r"str.*torch\.nn\.Module"):
        fxquant.trace("model.pt")
    with pytest.raises(OptionError, match=r"Call fxquant\.trace"):
        fxquant.trace_report(torch.fx.symbolic_trace(models.Plain()))


def test_one_tensor_passed_as_two_arguments_stays_two_inputs():
    model = models.CrossAttention().eval()
    memory = torch.randn(3, 5, WIDTH)
    gm = fxquant.trace(model, (X, X))
    with torch.no_grad():
        assert torch.allclose(gm(X, memory)[0], model(X, memory)[0], atol=1e-5)


@pytest.mark.parametrize("is_shared", [True, False])
def test_only_layers_of_the_user_are_listed_as_never_called(is_shared):
    example = (X, X) if is_shared else (X, torch.randn(3, 5, WIDTH))
    gm = fxquant.trace(AttentionAndIdle().eval(), example)
    assert fxquant.trace_report(gm).unreached == ["idle"]
    rows = {d.module: d.rule for d in fxquant.plan(gm).decisions}
    assert [name for name, rule in rows.items() if rule == "not called"] == ["idle"]


def test_an_example_that_is_too_short_to_show_the_general_way_is_followed_by_a_longer_one():
    case = CASES["HasAWayForShortInputs"]
    gm = fxquant.trace(case.model(), case.call())
    assert not fxquant.trace_report(gm).refused
    torch.manual_seed(4)
    longer = case.inputs(3, 37)
    torch.testing.assert_close(run(gm, longer), run(case.reference(), longer))
