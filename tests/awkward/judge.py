"""What every odd model is asked: helpers of the tests that judge graphs and copies."""

import re
import warnings

import torch
from torch import nn

import fxquant
from fxquant.errors import FxquantError
from fxquant.swap import LeftFloatWarning
from tests.awkward.registry import run
from tests.compare import assert_same, worst_sqnr
from tests.fingerprint import unchanged

OPTIONS = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}
QUANTIZED = ("int4", "int8")


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


def call_all(case, example, *candidates):
    """Make the calls of `case`, one after another, on its model and on all candidates.

    Gives, for each call, its number and `[expected, found, ...]`; calls that a graph refuses in
    words, because it holds for other shapes, are left out.
    """
    reference = case.reference()
    for index in range(len(case.sizes)):
        if case.first_calls:
            reference = case.reference()
        expected = run(reference, case.call(index))
        try:
            # Without gradients: torch's matmul takes another way where a parameter needs one.
            with torch.no_grad():
                results = [run(c, case.call(index)) for c in candidates]
            yield index, [expected, *results]
        except FxquantError as error:
            assert index > 0, f"refuses its own example: {error}"
            assert len(str(error)) > 30, str(error)
        except TypeError as error:  # optional arguments keep their defaults where none was shown
            if example or not case.blind or "forward() " not in str(error):
                raise
            return


def quantize(case, model, data):
    options = {**OPTIONS, **case.options}
    if data is not None:
        return fxquant.static_quantize(model, data, **options)
    return fxquant.quantize(model, **options)


def bare(name):
    """A name without the wrappers of torch.compile and DataParallel."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def rows_of(info, name):
    """The rows about the layer or parameter of this name, or about parts of it."""
    parts = re.compile(rf"{re.escape(bare(name))}([.\[_:].*)?")
    about = [d for d in info.decisions if parts.fullmatch(bare(d.module))]
    assert about, f"no row for {name}: {[d.module for d in info.decisions]}"
    exact = [d for d in about if bare(d.module) in (bare(name), f"{bare(name)}.weight")]
    return exact or about


def check_ledger(case, model, info, example):
    """Each linear weight has a row with a reason; those that can be quantized are."""
    for decision in info.decisions:
        assert len(decision.reason) > 10, decision
        assert decision.action in (*QUANTIZED, "float"), decision
    linears = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    names = case.layers if case.layers is not None else linears
    rows = {name: rows_of(info, name) for name in names if name}
    wanted = case.int4 if case.int4 is not None else rows
    if not example:  # a class with a weight of its own cannot be looked into without inputs
        wanted = set() if case.blind else set(wanted) & set(linears)
    for name in wanted:
        assert all(d.action in QUANTIZED for d in rows[name]), rows[name]
    if case.float_only:
        assert not info.selected_layers


def swapped_copy(case, model, q):
    """The user's class with the layers of `q`, and what it says to have left float."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LeftFloatWarning)
        with unchanged(model), unchanged(q):
            swapped = fxquant.swap_modules(model, q)
    left = swapped.fxquant_left_float
    if case.own:
        assert left == []
    return in_eval_mode(swapped), left


def check_quantized(case, example, model, q):
    """The quantized graph is close to the model, and the swapped copy computes its bits."""
    swapped, left = swapped_copy(case, model, q)
    for index, (expected, found, again) in call_all(case, example, q, swapped):
        worst = worst_sqnr(expected, found)
        assert worst > case.floor, f"call {index}: {worst:.1f} dB"
        if left:
            worst = worst_sqnr(expected, again)
            assert worst > case.floor, f"call {index}, swapped: {worst:.1f} dB; float: {left}"
        elif not case.own:  # a bare parameter that stays float is multiplied in another order
            worst = worst_sqnr(found, again)
            assert worst > 100, f"call {index}, swapped: {worst:.1f} dB from the graph"
        else:
            assert_same(again, found, bits=True, at=f"call {index}, swapped")
