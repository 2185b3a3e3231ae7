"""Every awkward model, with and without example inputs: traced, quantized, swapped, left alone."""

import re
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.swap import LeftFloatWarning
from tests.awkward import CASES
from tests.awkward.registry import run
from tests.compare import assert_same, worst_sqnr
from tests.fingerprint import unchanged

OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
QUANTIZED = ("int4", "int8")

# Without inputs, quantizing says that nothing was verified; graphs of odd models may warn too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=[True, False], ids=["example", "no example"])
def example(request):
    return request.param


class RefusedError(Exception):
    """The model was refused in words, as it may be."""


def attempt(case, example, call):
    """What `call` returns; `RefusedError` if it raises an error in words that is expected."""
    try:
        return call()
    except FxquantError as error:
        text = str(error)
        assert len(text) > 30, text
        assert not re.search(r"0x[0-9a-f]{6}|Traceback", text), text
        if case.refused and re.search(case.refused, text):
            raise RefusedError from error
        if case.blind and not example:
            raise RefusedError from error
        raise


def has_values(model):
    """Whether the model can be run at all."""
    tensors = [*model.parameters(), *model.buffers()]
    return not any(t.device.type == "meta" or nn.parameter.is_lazy(t) for t in tensors)


def in_eval_mode(model):
    try:
        model.eval()
    except NotImplementedError:  # an exported program stays in the mode it was exported in
        return model
    return model


def compare_calls(case, candidate, compare):
    """Run the calls of `case`, one after another, on its model and on `candidate`."""
    reference = case.reference()
    compared = 0
    for index in range(len(case.sizes)):
        if case.first_calls:
            reference = case.reference()
        expected = run(reference, case.call(index))
        try:
            found = run(candidate, case.call(index))
        except FxquantError as error:  # a graph for other shapes only, that says so
            assert index > 0, f"refuses its own example: {error}"
            assert len(str(error)) > 30, str(error)
            continue
        try:
            compare(found, expected)
        except AssertionError as error:
            error.add_note(f"call {index} of {case.sizes}: {case.sizes[index]}")
            raise
        compared += 1
    return compared


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
        assert compare_calls(case, gm, assert_same)


def quantize(case, model, data):
    options = {**OPTIONS, **case.options}
    if data is not None:
        return fxquant.static_quantize(model, data, **options)
    return fxquant.quantize(model, **options)


def row_of(info, name):
    """The rows that are about the layer or parameter of this name, or a part of it."""
    about = [
        d for d in info.decisions
        if d.module in (name, f"{name}.weight") or d.module.startswith(f"{name}.")
        or re.fullmatch(rf"{re.escape(name)}[\[._:].*", d.module)
    ]  # fmt: skip
    assert about, f"no row for {name}: {[d.module for d in info.decisions]}"
    return about


def check_ledger(case, model, info):
    for decision in info.decisions:
        assert len(decision.reason) > 10, decision
        assert decision.action in (*QUANTIZED, "float"), decision
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    names = case.layers if case.layers is not None else linears
    rows = {name: row_of(info, name) for name in names if name}
    for name in case.int4 if case.int4 is not None else rows:
        assert all(d.action in QUANTIZED for d in rows[name]), rows[name]
    if case.float_only:
        assert not info.selected_layers


def check_swapped(case, model, q):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftFloatWarning)
        with unchanged(model):
            swapped = fxquant.swap_modules(model, q)
    left = swapped.fxquant_left_float
    if case.own:
        assert left == []
    in_eval_mode(swapped)
    for index in range(len(case.sizes)):
        try:
            expected = run(q, case.call(index))
        except FxquantError:  # not a shape that the graph takes
            continue
        found = run(swapped, case.call(index))
        if left:
            assert worst_sqnr(expected, found) > case.floor, left
        else:
            assert_same(found, expected, bits=True)


def test_the_quantized_graph_is_close_and_the_swapped_copy_equal_to_it(case, example):
    model, data = case.model(), None
    if example:
        data = [case.call(), case.call()]
    try:
        with unchanged(model, data):
            q, info = attempt(case, example, lambda: quantize(case, model, data))
    except RefusedError:
        return
    assert has_values(model), "a model without values was quantized"
    check_ledger(case, model, info)

    def close(found, expected):
        worst = worst_sqnr(expected, found)
        assert worst > case.floor, f"{worst:.1f} dB"

    assert compare_calls(case, q, close)
    check_swapped(case, model, q)


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
