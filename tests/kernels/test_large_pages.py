"""Memory for large weights."""

import copy
import mmap
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph.copying import copy_owning_tensors
from fxquant.kernels import large_pages
from fxquant.kernels.large_pages import PAGE, cloned, empty_bytes

needs_pages = pytest.mark.skipif(not large_pages._HAS_PAGES, reason="no large pages here")


@pytest.mark.parametrize("shape", [(0,), (3, 5), (PAGE,), (3, 7, PAGE // 16 + 5)])
def test_it_is_memory_like_any_other(shape):
    memory = empty_bytes(shape)
    assert (memory.shape, memory.dtype, memory.is_contiguous()) == (shape, torch.uint8, True)
    memory.copy_(torch.arange(memory.numel()).view(shape) % 251)
    assert torch.equal(cloned(memory), memory)
    assert torch.equal(pickle.loads(pickle.dumps(memory)), memory)
    assert memory.untyped_storage().nbytes() == memory.numel()


@needs_pages
def test_what_fills_a_page_begins_at_one():
    assert empty_bytes((PAGE + 1,)).data_ptr() % PAGE == 0


@needs_pages
def test_a_last_page_that_is_not_full_takes_what_it_holds():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    count, size = 16, PAGE + PAGE // 8
    before = resident()
    held = [empty_bytes((size,)).fill_(1) for _ in range(count)]
    assert resident() - before < 1.3 * count * size
    assert all(memory[-1] == 1 for memory in held)


def test_other_tensors_are_cloned_as_they_are():
    apart = torch.arange(12, dtype=torch.uint8).view(3, 4).t()
    assert torch.equal(cloned(apart), apart)
    floats = torch.randn(3)
    assert torch.equal(cloned(floats), floats)


@pytest.mark.parametrize("has_pages", [True, False])
def test_a_system_without_them(has_pages, monkeypatch):
    def refuse(*_):
        raise OSError("Invalid argument")

    if has_pages and large_pages._HAS_PAGES:  # but the kernel was built without
        mapped = large_pages.mmap

        class Mapped(mapped.mmap):
            madvise = refuse

        monkeypatch.setattr(mapped, "mmap", Mapped)
    else:
        monkeypatch.setattr(large_pages, "_HAS_PAGES", False)
    assert empty_bytes((PAGE,)).fill_(7).sum() == 7 * PAGE


@needs_pages
@pytest.mark.parametrize("copied", [copy.deepcopy, copy_owning_tensors])
def test_copies_of_layers_have_them_too(copied):
    layer = fxquant.QuantizedLinearInt4.from_float(nn.Linear(2048, 2240))
    if layer.backend != "native":
        pytest.skip("the layout is another backend's")
    made = copied(nn.Sequential(layer))[0]
    for each in (layer, made):
        assert each.packed_memory.data_ptr() % PAGE == 0
    assert torch.equal(layer.packed_memory, made.packed_memory)
    assert layer.packed_memory.data_ptr() != made.packed_memory.data_ptr()
