"""A cache with room for more tokens, against that of transformers."""

import copy

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from fxquant.integrations.transformers import RoomyCache
from fxquant.integrations.transformers.cache import LEAST_ROOM
from tests.integrations import models


def states(tokens, batch=2):
    return torch.randn(2, batch, 3, tokens, 8).unbind()


def both():
    return DynamicCache(), RoomyCache()


def same(caches):
    first, second = (cache.layers[0] for cache in caches)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    return torch.equal(first.keys, second.keys) and torch.equal(first.values, second.values)


def test_it_holds_what_the_other_holds_and_seldom_copies():
    torch.manual_seed(0)
    caches, places = both(), set()
    for tokens in (5, *[1] * 3, LEAST_ROOM, 2, 1):
        given = states(tokens)
        expected, found = (cache.update(*given, 0) for cache in caches)
        assert all(map(torch.equal, expected, found))
        places.add(found[0].data_ptr())
    assert same(caches)
    assert len(places) == 2


CHANGES = {
    "crop": lambda cache: cache.crop(-3),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
    "reset": lambda cache: cache.reset(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_the_cache(name):
    torch.manual_seed(0)
    caches = both()
    for given in (states(6), states(1)):
        for cache in caches:
            cache.update(*given, 0)
    for cache in caches:
        CHANGES[name](cache)
    given = states(2, batch=4 if name == "repeat" else 2)
    for cache in caches:
        cache.update(*given, 0)
    assert same(caches)


def test_what_was_given_stays_after_a_crop():
    torch.manual_seed(0)
    cache = RoomyCache()
    cache.update(*states(4), 0)
    given = cache.update(*states(1), 0)
    before = [tensor.clone() for tensor in given]
    cache.crop(-2)
    cache.update(*states(2), 0)
    assert all(map(torch.equal, before, given))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_do_not_write_into_each_other(copied):
    torch.manual_seed(0)
    cache = RoomyCache()
    cache.update(*states(4), 0)
    other = RoomyCache()
    other.layers = [copied(layer) for layer in cache.layers]
    kept = other.update(*states(1), 0)
    before = [tensor.clone() for tensor in kept]
    cache.update(*states(1), 0)
    assert all(map(torch.equal, before, kept))


def test_gradients_and_modes():
    torch.manual_seed(0)
    cache = RoomyCache()
    given = [tensor.detach().requires_grad_() for tensor in states(3)]
    keys, values = cache.update(*given, 0)
    (keys.sum() + values.square().sum()).backward()
    assert all(tensor.grad is not None for tensor in given)
    with torch.inference_mode():
        cache.reset()
        cache.update(*states(3), 0)
    keys, _ = cache.update(*states(1), 0)
    assert keys.shape == (2, 3, 4, 8)


def test_texts_and_sliding_windows():
    model = models.swapped(models.MODELS["llama"]())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = torch.arange(1, 15).view(2, 7)
    expected = model.generate(ids, **options)
    cache = RoomyCache(config=model.config)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)
    assert cache.layers[0].keys.shape[-2] == 12
    config = MistralConfig(num_hidden_layers=2, sliding_window=4)
    names = [type(layer) for layer in DynamicCache(config=config).layers]
    assert [type(layer) for layer in RoomyCache(config=config).layers] == names
