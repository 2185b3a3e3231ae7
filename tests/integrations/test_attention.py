"""fxquant's attention in models of transformers, against that of torch."""

import pytest
import torch
from torch import nn

import fxquant.integrations.transformers
from fxquant.integrations.transformers import attention as integration
from tests.integrations import models


@pytest.fixture
def calls(monkeypatch):
    """How often each of the two was called."""
    counts = {"fxquant": 0, "sdpa": 0}

    def counting(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(integration, "attention", counting("fxquant", integration.attention))
    sdpa = counting("sdpa", integration.sdpa_attention_forward)
    monkeypatch.setattr(integration, "sdpa_attention_forward", sdpa)
    return counts


def output(model, **inputs):
    with torch.no_grad():
        made = model(**inputs)
    return made.logits if "logits" in made else made.last_hidden_state


@pytest.mark.parametrize(
    ("name", "dtype", "lowest_db"),
    [("llama", torch.bfloat16, 35), ("llama", torch.float32, 100), ("bert", torch.float32, 100)],
)
def test_models_compute_what_they_compute_with_sdpa(name, dtype, lowest_db, calls):
    model = models.MODELS[name]().to(dtype)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[0, 7:] = 0
    for given in (None, mask):
        inputs = {"input_ids": torch.arange(1, 23).view(2, 11), "attention_mask": given}
        model.set_attn_implementation("sdpa")
        expected = output(model, **inputs)
        model.set_attn_implementation("fxquant")
        found = output(model, **inputs)
        seen = torch.ones(2, 11).bool() if given is None else given.bool()
        assert fxquant.sqnr_db(expected[seen].float(), found[seen].float()) > lowest_db
    assert calls == {"fxquant": 2, "sdpa": 0}


def test_a_swapped_model_continues_texts_alike(calls):
    model = models.swapped(models.MODELS["llama"]())
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    ids, texts = torch.arange(1, 15).view(2, 7), []
    for name in ("sdpa", "fxquant"):
        model.set_attn_implementation(name)
        for cache in (None, "static"):
            texts.append(model.generate(ids, cache_implementation=cache, **options))
    assert all(torch.equal(text, texts[0]) for text in texts)
    assert calls == {"fxquant": 8, "sdpa": 0}


def test_what_asks_for_more_is_computed_by_sdpa(calls):
    layer, tensors = nn.Module(), torch.randn(3, 1, 2, 5, 8).unbind()
    layer.is_causal = False
    bias = torch.randn(1, 2, 5, 5)
    for options in ({"dropout": 0.5}, {"position_bias": bias}):
        found, _ = integration.attend(layer, *tensors, None, **options)
        assert found.shape == (1, 5, 2, 8)
    assert calls == {"fxquant": 0, "sdpa": 2}
    with pytest.raises(ValueError, match="softcap"):
        integration.attend(layer, *tensors, None, softcap=20.0)


def test_gradients_and_compiled_models():
    torch.manual_seed(0)
    layer, tensors = nn.Module(), torch.randn(3, 1, 2, 5, 8)
    results = []
    for call in (integration.attend, integration.sdpa_attention_forward):
        given = tensors.clone().requires_grad_()
        found, _ = call(layer, *given.unbind(), None)
        found.square().sum().backward()
        results.append((found.detach(), given.grad))
    torch.testing.assert_close(*results)
    compiled = torch.compile(integration.attend, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(layer, *tensors.unbind(), None)[0], results[0][0])
