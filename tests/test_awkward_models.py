"""Every awkward model, with and without example inputs: traced, quantized, swapped, left alone."""

import pytest
import torch

import fxquant
from fxquant.errors import SaveError
from tests.awkward import CASES
from tests.awkward.judge import (
    RefusedError,
    attempt,
    call_all,
    check_ledger,
    check_quantized,
    has_values,
    quantize,
)
from tests.compare import assert_same
from tests.fingerprint import unchanged

# Without inputs, quantizing says that nothing was verified; graphs of odd models may warn too.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("float32_products"),
]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[True, False], ids=["example", "no example"])
def example(request):
    return request.param


def memory(module):
    """The names of a module's tensors by where they live."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {t.untyped_storage().data_ptr(): name for name, t in tensors if t.numel()}


def objects(module):
    """The names of a module's parameters by identity."""
    return {id(p): name for name, p in module.named_parameters()}


def assert_none_shared(of, *tables):
    """No key of one table is in another."""
    for i, table in enumerate(tables):
        for other in tables[i + 1 :]:
            shared = [(table[key], other[key]) for key in table.keys() & other.keys()]
            assert not shared, f"{of} shared: {shared}"


def check_file(case, q, path):
    """A saved graph loads with its bits, or is refused when it is saved."""
    try:
        fxquant.save_model(q, path)
    except SaveError as error:
        assert len(str(error)) > 30, str(error)
        assert not path.exists()
        assert fxquant.trace_report(q).opaque or case.unsaved in str(error), error
        return
    again = fxquant.load_model(path)
    for index, (_, found, loaded) in call_all(case, True, q, again):
        assert_same(loaded, found, bits=True, at=f"call {index}, loaded")


def test_the_graph_computes_what_the_model_computes(case, example):
    model, inputs = case.model(), case.call()
    try:
        with unchanged(model, inputs):
            arguments = (model, inputs) if example and has_values(model) else (model,)
            gm = attempt(case, example, lambda: fxquant.trace(*arguments))
    except RefusedError:
        return
    assert isinstance(gm, torch.fx.GraphModule)
    assert not any(m.training for m in gm.modules())
    if has_values(model):
        for index, (expected, found) in call_all(case, example, gm):
            assert_same(found, expected, at=f"call {index}")


def test_the_quantized_graph_is_close_and_the_swapped_copy_and_the_file_equal_to_it(
    case, example, tmp_path
):
    model, data = case.model(), None
    if example:
        data = [case.call(), case.call()]
    try:
        with unchanged(model, data):
            q, info = attempt(case, example, lambda: quantize(case, model, data))
    except RefusedError:
        return
    assert has_values(model), "a model without values was quantized"
    check_ledger(case, model, info, example)
    check_quantized(case, example, model, q)
    if example:
        check_file(case, q, tmp_path / "graph.safetensors")


def test_the_model_the_graphs_and_the_swapped_copy_are_independent(case):
    if case.refused:
        return  # whether they work at all is another test's question
    model = case.model()
    try:
        gm = attempt(case, False, lambda: fxquant.trace(model))
        q, _ = attempt(case, False, lambda: quantize(case, model, None))
    except RefusedError:
        gm = fxquant.trace(model, case.call())
        q, _ = quantize(case, model, [case.call()])
    swapped = fxquant.swap_modules(model, q)
    assert_none_shared("Parameter objects", *map(objects, (model, gm, q, swapped)))
    assert_none_shared("memory", *map(memory, (model, q, swapped)))
