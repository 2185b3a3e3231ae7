"""Copies of batches with tokens drawn at random: which arguments, which tokens, what is told."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.calls import Call
from fxquant.passes.token_noise import noisy_copies, token_arguments

WORDS, WIDTH = 300, 32
QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


class Text(nn.Module):
    """Words, kinds of segments and positions, each looked up; and one layer."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.kinds = nn.Embedding(2, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, kinds, places, attention_mask=None):
        x = self.words(ids.view(-1, ids.shape[-1])) + self.kinds(kinds) + self.places(places)
        return self.linear(x)


def batch(rows=6, tokens=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    places = torch.arange(tokens).expand(rows, -1)
    return {"ids": ids, "kinds": ids % 2, "places": places, "attention_mask": mask}


def made(batches, share=0.5):
    model = Text().eval()
    return noisy_copies(
        [Call.of(b) for b in batches], share, lambda call: call.run(model), lambda call: True
    )


def test_the_tokens_are_what_an_embedding_of_words_looks_up():
    model = Text().eval()
    found = token_arguments(Call.of(batch()), lambda call: call.run(model))
    assert found == {0: WORDS}


def test_one_batch_in_four_is_copied():
    assert len(made([batch(seed=i) for i in range(9)])) == 3
    assert made([batch()], share=0) == []


def test_only_inner_tokens_of_the_copies_are_drawn():
    given = batch(rows=200)
    (copy,) = made([given])
    changed = copy.kwargs["ids"] != given["ids"]
    assert not changed[:, 0].any()
    assert not changed[1:, -1].any()
    assert not changed[0, 6:].any()  # the last token before padding, and padding
    assert 0.45 < changed[1:, 1:-1].float().mean() < 0.55
    assert int(copy.kwargs["ids"].max()) < WORDS
    for name in ("kinds", "places", "attention_mask"):
        assert torch.equal(copy.kwargs[name], given[name])


def test_the_same_copies_are_made_each_time():
    first, second = made([batch()]), made([batch()])
    assert torch.equal(first[0].kwargs["ids"], second[0].kwargs["ids"])


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_layers_are_fitted_to_the_copies_and_figures_are_of_the_data(method):
    torch.manual_seed(0)
    model, data = Text().eval(), [batch(seed=i) for i in range(4)]
    results = [
        fxquant.quantize(model, data, method=method, token_noise=share, **QUIET)
        for share in (0.0, 0.5)
    ]
    (plain, without), (noisy, record) = results
    assert not torch.equal(plain.linear.bias, noisy.linear.bias)
    assert record.calibration_samples_used == without.calibration_samples_used == 24
    assert record.heldout_samples == without.heldout_samples == 3
    # What was measured can be computed from the rows that were held out, without noise.
    last = {name: value[-3:] for name, value in data[-1].items()}
    with torch.no_grad():
        expected = fxquant.sqnr_db(model(**last), noisy(**last))
    assert record.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_a_model_without_tokens_is_refused():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH)).eval()
    with pytest.raises(fxquant.OptionError, match="no argument that it looks up as ids of tokens"):
        fxquant.quantize(model, [torch.randn(4, WIDTH)], token_noise=0.5, **QUIET)


def test_noise_without_data_is_refused():
    with pytest.raises(fxquant.OptionError, match=r"token_noise: got 0\.5 without data"):
        fxquant.quantize(Text().eval(), token_noise=0.5, **QUIET)


@pytest.mark.parametrize("share", [-0.1, 1.5, "half", True, float("nan")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(fxquant.OptionError, match="token_noise: got"):
        fxquant.QuantConfig(token_noise=share)


class Picky(Text):
    """Refuses words that it was not made for."""

    def forward(self, ids, kinds, places, attention_mask=None):
        torch._assert_async((ids < 100).all(), "a word of another language")
        return super().forward(ids, kinds, places, attention_mask)


def test_a_model_that_refuses_tokens_drawn_at_random_is_named():
    data = batch()
    data["ids"] %= 100
    with pytest.raises(fxquant.OptionError, match="does not run on tokens drawn at random"):
        fxquant.quantize(Picky().eval(), [data], token_noise=0.5, **QUIET)
