"""Routers of experts: they stay float, and the record says how many tokens they send elsewhere."""

import pytest
import torch
from torch import Tensor, nn

import fxquant
from fxquant.graph.routing import choices_of_experts, routers
from fxquant.measure.chosen_experts import ChosenExperts
from tests import zoo

OPTIONS = {"group_size": 32, "method": "rtn", "accuracy_warning": "ignore"}


class Mixture(nn.Module):
    """Two of four experts for each token, by the scores of a router behind a bottleneck."""

    def __init__(self, is_first: bool) -> None:
        super().__init__()
        self.is_first = is_first
        self.narrow, self.scores = nn.Linear(64, 64), nn.Linear(64, 64)
        self.table = nn.Parameter(torch.randn(64, 64, 64) / 8)
        self.out = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.scores(torch.relu(self.narrow(x))), -1)
        if self.is_first:
            chosen = scores.argmax(-1)
            return self.out(torch.bmm(x[:, None], self.table[chosen].mT)[:, 0])
        weights, chosen = scores.topk(2, -1)
        y = torch.bmm(x.repeat_interleave(2, 0)[:, None], self.table[chosen.flatten()].mT)
        return self.out((y.view(len(x), 2, -1) * weights[..., None]).sum(1))


@pytest.mark.parametrize("is_first", [False, True])
def test_a_router_stays_float_unless_it_is_named(is_first):
    torch.manual_seed(0)
    model = Mixture(is_first).eval()
    data = [torch.randn(32, 64) for _ in range(8)]
    graph = fxquant.trace(model, data[0])
    assert routers(graph) == {"scores"}
    _, info = fxquant.quantize(graph, data, **OPTIONS)
    actions = {d.module: (d.action, d.rule) for d in info.decisions}
    assert actions["scores"] == ("float", "default: router")
    assert {actions[name][0] for name in ("narrow", "table", "out")} == {"int4"}
    for options in ({"bits": {"*": 4}}, {"skip_layer_names": ()}):
        _, named = fxquant.quantize(graph, data, **{**OPTIONS, **options})
        assert "scores" in named.selected_layers


def test_the_share_of_tokens_that_change_experts_is_that_of_a_count_by_hand(tmp_path):
    torch.manual_seed(0)
    model = Mixture(False).eval()
    data = [torch.randn(32, 64) for _ in range(8)]
    graph, info = fxquant.quantize(model, data, **{**OPTIONS, "bits": {"*": 2}})
    (name,) = info.changed_experts
    assert name == "table"
    held_out = data[-1:]  # an eighth of the rows, the last ones
    changed = tokens = 0
    for x in held_out:
        hidden = torch.relu(model.narrow(x))
        expected = model.scores(hidden).topk(2, -1).indices.sort(-1).values
        found = graph.scores(torch.relu(graph.narrow(x))).topk(2, -1).indices.sort(-1).values
        changed += int((expected != found).any(-1).sum())
        tokens += len(x)
    if tokens == info.heldout_samples:
        assert info.changed_experts[name] == changed / tokens
    assert 0 < info.changed_experts[name] < 1
    assert f"experts: {info.changed_experts[name]:.1%} of the tokens" in str(info)
    fxquant.save_model(graph, tmp_path / "m.safetensors", info)
    loaded = fxquant.info(fxquant.load_model(tmp_path / "m.safetensors"))
    assert loaded.changed_experts == info.changed_experts


@pytest.mark.parametrize("name", ["mixtral"])
def test_routers_of_real_classes_are_found(name):
    model = zoo.build(name)
    graph = fxquant.trace(model, zoo.inputs(name))
    assert routers(graph) == {f"model.layers.{i}.mlp.gate" for i in range(2)}
    assert len(choices_of_experts(graph)) == 2
    _, info = fxquant.quantize(graph, [zoo.inputs(name)], skip_param_threshold=0, **OPTIONS)
    assert set(info.changed_experts) == set(choices_of_experts(graph).values())
    assert all(f"model.layers.{i}.mlp.gate" in info.skipped_layers for i in range(2))


def test_the_order_of_experts_does_not_count_and_other_shapes_are_not_compared():
    seen = ChosenExperts()
    seen.add((None, torch.tensor([[0, 1], [2, 3]])), (None, torch.tensor([[1, 0], [2, 1]])))
    seen.add(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 0]))
    seen.add(torch.tensor([1]), torch.tensor([1, 2]))
    assert (seen.tokens, seen.changed) == (5, 2)
    other = ChosenExperts()
    other.merge(seen)
    assert (other.tokens, other.changed) == (5, 2)


def test_a_model_without_experts_has_no_router():
    graph = fxquant.trace(zoo.build("bert"), zoo.inputs("bert"))
    assert routers(graph) == set()
