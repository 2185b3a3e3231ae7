"""A forward that seeds the random numbers draws the same ones in its graph."""

import torch
from torch import nn

import fxquant

W = 8


class HashesBySeed(nn.Module):
    """The signs of a random projection, the same in each call, say how to scale a token."""

    def __init__(self, seed=3):
        super().__init__()
        self.fc, self.seed = nn.Linear(W, W), seed

    def forward(self, x):
        h = self.fc(x)
        torch.manual_seed(self.seed)
        rotation = torch.randn(W, 4)
        return h * ((h @ rotation) > 0).sum(-1, keepdim=True)


class ScalesBySeed(HashesBySeed):
    """There are as many numbers as tokens."""

    def forward(self, x):
        torch.manual_seed(self.seed)
        return self.fc(x) * torch.rand(x.shape[1], 1)


def test_what_is_drawn_from_a_seed_is_a_constant_that_can_be_saved(tmp_path):
    torch.manual_seed(0)
    model = HashesBySeed().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    assert not fxquant.trace_report(gm).opaque
    fxquant.save_model(gm, tmp_path / "model.fxq")
    loaded, x = fxquant.load_model(tmp_path / "model.fxq"), torch.randn(3, 7, W)
    state = torch.get_rng_state()
    found = loaded(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(found, model(x))


def test_the_graph_seeds_as_the_model_does():
    torch.manual_seed(0)
    model = ScalesBySeed().eval()
    gm = fxquant.trace(model, torch.randn(2, 5, W))
    assert not fxquant.trace_report(gm).opaque
    x = torch.randn(3, 7, W)
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected, after = model(x), torch.randn(1)
        torch.manual_seed(seed + 10)
        torch.testing.assert_close(gm(x), expected)
        assert torch.equal(torch.randn(1), after)


def test_tracing_leaves_the_random_state_alone():
    model, x = HashesBySeed().eval(), torch.randn(2, 5, W)
    state = torch.get_rng_state()
    fxquant.trace(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.manual_seed is torch.random.manual_seed
