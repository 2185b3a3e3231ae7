"""Memory for values that wait."""

import torch

from fxquant.passes.arenas import Arenas, bytes_of
from fxquant.passes.held_values import HeldValues


def test_copies_are_whole_and_apart():
    arenas, values = Arenas(), [torch.arange(5), torch.randn(7, 3).bfloat16()]
    copies = arenas.copies([value.untyped_storage() for value in values])
    for value, copy in zip(values, copies, strict=True):
        found = torch.empty(0, dtype=value.dtype).set_(copy, 0, value.shape, value.stride())
        assert torch.equal(found, value)
        assert copy.nbytes() == value.untyped_storage().nbytes()
        assert copy.data_ptr() % 64 == 0
    bytes_of(copies[0]).zero_()
    assert bytes_of(copies[1]).any()
    assert values[0].any()


def test_memory_is_used_again_when_nothing_uses_it():
    arenas, value = Arenas(), torch.ones(1000).untyped_storage()
    first = arenas.copies([value])
    view = bytes_of(first[0])[:4]
    size = arenas.nbytes
    del first
    second = arenas.copies([value])  # the view still needs the other one
    assert arenas.nbytes == 2 * size
    second[0].fill_(0)
    assert view.any()
    del view
    third = arenas.copies([value])
    assert arenas.nbytes == 2 * size
    assert third[0].data_ptr() != second[0].data_ptr()
    del third
    arenas.copies([torch.ones(3000).untyped_storage()])  # in the place of a free one
    assert arenas.nbytes < 5 * size


def test_batches_that_wait_take_one_mapping_more_than_there_are_batches():
    held, size = HeldValues(None), 4 * 1024
    for key in range(3):
        held.put(key, [{"x": torch.full((1024,), float(key)), "none": None}])
    for _ in range(5):
        for key in range(3):
            (values,) = held.take(key)
            assert bool((values["x"] == key).all())
            held.put(key, [{"x": values["x"] + 0, "same": values["x"], "none": None}])
            del values
    assert held.held_bytes == 3 * 2 * size
    assert held._arenas.nbytes <= 4 * 2 * size
    held.close()
    assert held._arenas.nbytes == 0
