"""The form of a description: checked as a whole before any of it is used.

A form is a function that raises where the data is not as it says; `at` is the place, for the error.
What names and numbers mean is checked where they are used; here, that they are names and numbers.
"""

from collections.abc import Callable
from typing import Any

from fxquant.errors import LoadError
from fxquant.graph.shapes import DTYPE, MODULE_PATH, SHAPE

Form = Callable[[Any, str], None]
MOST = 1_000_000  # entries of a list or mapping
MOST_CHARACTERS = 100_000  # of a text
MOST_DEPTH = 100  # of values and records
LARGEST_INTEGER = 1 << 62


class FormError(Exception):
    """Data has another form than it must have; the text says where and what."""


def text(data: Any, at: str) -> None:
    """A text that is not endless."""
    if not isinstance(data, str) or len(data) > MOST_CHARACTERS:
        raise FormError(f"{at} is {data!r:.60}, not a text")


def flag(data: Any, at: str) -> None:
    """True or false."""
    if type(data) is not bool:
        raise FormError(f"{at} is {data!r:.60}, neither true nor false")


def whole(data: Any, at: str) -> None:
    """A number without a fraction."""
    if type(data) is not int or abs(data) > LARGEST_INTEGER:
        raise FormError(f"{at} is {data!r:.60}, not a whole number")


def number(data: Any, at: str) -> None:
    """Any number; records hold None where nothing was measured, and text for what JSON lacks."""
    if data not in (None, "inf", "-inf", "nan") and type(data) not in (int, float):
        raise FormError(f"{at} is {data!r:.60}, not a number")


def anything(data: Any, at: str, depth: int = 0) -> None:
    """Plain data of limited size."""
    if depth > MOST_DEPTH:
        raise FormError(f"{at} is nested too deeply")
    if isinstance(data, str):
        text(data, at)
    elif isinstance(data, int | float):
        if type(data) is int and data.bit_length() > 1024:
            raise FormError(f"{at} is a number of {data.bit_length()} bits")
    elif isinstance(data, list | dict):
        if len(data) > MOST:
            raise FormError(f"{at} has {len(data)} entries")
        for part in data if isinstance(data, list) else (*data.keys(), *data.values()):
            anything(part, at, depth + 1)


def list_of(form: Form) -> Form:
    """A list whose entries have one form."""

    def check(data: Any, at: str) -> None:
        if not isinstance(data, list) or len(data) > MOST:
            raise FormError(f"{at} is {data!r:.60}, not a list")
        for index, part in enumerate(data):
            form(part, f"{at}[{index}]")

    return check


def map_of(form: Form) -> Form:
    """A mapping from any text to one form."""

    def check(data: Any, at: str) -> None:
        if not isinstance(data, dict) or len(data) > MOST:
            raise FormError(f"{at} is {data!r:.60}, not a mapping")
        for key, part in data.items():
            text(key, at)
            form(part, f"{at}[{key!r:.60}]")

    return check


def optional(form: Form) -> Form:
    """The form, or None."""

    def check(data: Any, at: str) -> None:
        if data is not None:
            form(data, at)

    return check


def record(needed: dict[str, Form], more: dict[str, Form] | None = None) -> Form:
    """A mapping with all the `needed` keys, perhaps some of `more`, and no other."""
    forms = {**needed, **(more or {})}

    def check(data: Any, at: str) -> None:
        if not isinstance(data, dict):
            raise FormError(f"{at} is {data!r:.60}, not a record")
        missing, unknown = set(needed) - set(data), set(data) - set(forms)
        if missing or unknown:
            raise FormError(f"{at} lacks {sorted(missing)} or has {sorted(unknown)!r:.80}")
        for key, part in data.items():
            forms[key](part, f"{at}.{key}")

    return check


def map_of_widths(form: Form) -> Form:
    """A mapping from numbers of bits, which JSON writes as text, to one form."""

    def check(data: Any, at: str) -> None:
        map_of(form)(data, at)
        for key in data:
            if not (key.isascii() and key.isdigit() and len(key) < 4):
                raise FormError(f"{at} has the key {key!r:.60}, not a number of bits")

    return check


_texts = list_of(text)
_reference = record({"tensor": text}, {"order": list_of(whole), "complex": flag, "parameter": flag})
_references = map_of(_reference)
_node = record(
    {
        "op": text, "name": text, "target": text, "args": anything, "kwargs": anything,
        "meta": record({}, {SHAPE: list_of(whole), DTYPE: text, MODULE_PATH: text}),
    }
)  # fmt: skip
_graph = record(
    {
        "class_name": text, "nodes": list_of(_node), "modules": map_of(whole),
        "attributes": _references, "training": flag,
    }
)  # fmt: skip
_state: dict[str, Form] = {
    "class": text, "parameters": _references, "buffers": _references, "empty": list_of(_texts),
    "children": map_of(optional(whole)), "training": flag,
}  # fmt: skip
_left_out = record({}, {"value": anything, "left_out": text})
_MODULES: dict[str, Form] = {
    "graph": record({"graph": _graph}),
    "description": record(
        {"class": text, "description": anything, "tensors": _references, "training": flag}
    ),
    "arguments": record({**_state, "arguments": anything}),
    "attributes": record(
        {**_state, "attributes": map_of(_left_out), "tensors": _references, "transient": _texts}
    ),
}


def _module(data: Any, at: str) -> None:
    kinds = [kind for kind in _MODULES if isinstance(data, dict) and kind in data]
    if len(kinds) != 1:
        raise FormError(f"{at} is {data!r:.60}, not a module")
    _MODULES[kinds[0]](data, at)
    if "empty" in data and len(data["empty"]) != 2:
        raise FormError(f"{at}.empty is not one list of parameters and one of buffers")
    if any(len(value) != 1 for value in data.get("attributes", {}).values()):
        raise FormError(f"{at}.attributes has one without a value")


_trace = record(
    {
        "way": text, "verified": whole, "attempts": _texts,
        "opaque": list_of(
            record({"module": text, "type": text, "reason": text}, {"classes": _texts})
        ),
        "unreached": _texts,
    },
    {
        "read_only": _texts, "without_bias": _texts, "left_out": _texts, "refused": _texts,
        "coverage": number,
        "product_elements": map_of(whole), "traced_elements": map_of(whole),
        "bare": map_of(
            record({"name": text, "is_transposed": flag, "index": optional(whole)})
        ),
    },
)  # fmt: skip


def _info_trace(data: Any, at: str) -> None:
    """The record of a trace; empty where the record was made without one."""
    if data != {}:
        _trace(data, at)


def _bits(data: Any, at: str) -> None:
    """A width, or a mapping from names to widths."""
    if isinstance(data, dict):
        map_of(whole)(data, at)
    else:
        whole(data, at)


_decision = record(
    {
        "module": text, "kind": text, "shape": list_of(whole), "parameters": whole, "action": text,
        "rule": text, "reason": text,
    },
    {"product": optional(text), "weight_elements": whole},
)  # fmt: skip
_row = record(
    {
        "module": text, "kind": text, "shape": list_of(whole), "params": whole, "bits": whole,
        "weight_sqnr_db": number,
    },
    {
        "introduced_sqnr_db": number, "cumulative_sqnr_db": number, "arrived_sqnr_db": number,
        "output_sqnr_db": number, "output_errors": map_of_widths(number), "shares_input": text,
        "saved_bytes": map_of_widths(whole), "shares_weight": text,
        "input_low": number, "input_high": number, "input_outlier_ratio": number,
    },
)  # fmt: skip
_config = record(
    {},
    {
        "bits": _bits, "embeddings": whole, "group_size": whole, "symmetric": flag,
        "zero_points": text, "code_book": text, "target": text, "method": text, "observer": text,
        "activation_bits": optional(whole), "activation_products": flag, "layer_types": _texts,
        "modules_to_not_convert": _texts, "skip_layer_types": _texts, "skip_layer_names": _texts,
        "skip_param_threshold": whole, "num_calibration_samples": whole, "token_noise": number,
        "fuse": flag, "accuracy_warning": text, "sqnr_warning_threshold": number,
        "sqnr_error_threshold": number,
    },
)  # fmt: skip
_folded = record(
    {"producers": _texts, "readers": _texts, "kind": text, "power": number, "gain_db": number}
)
_folded_norm = record({"norm": text, "layer": text, "tensors": map_of(text), "eps": number})
_info = record(
    {"decisions": list_of(_decision)},
    {
        "rows": list_of(_row), "folded_scales": list_of(_folded),
        "folded_norms": list_of(_folded_norm), "fused": map_of(whole), "warnings": _texts,
        "products": map_of(text), "changed_experts": map_of(number),
        "trace": _info_trace, "config": _config, "method": text, "sqnr_db": number,
        # instead of "config", in files that were written before it was there
        "bits": _bits, "group_size": whole, "symmetric": flag, "observer": text,
        "activation_bits": optional(whole),
        "fitted_sqnr_db": number, "original_size_mb": number, "quantized_size_mb": number,
        "compression_ratio": number, "calibration_samples_used": whole, "heldout_samples": whole,
        "warning_threshold": number, "error_threshold": number,
    },
)  # fmt: skip


def _mark(data: Any, at: str) -> None:
    list_of(whole)(data, at)
    if not data:
        raise FormError(f"{at} is empty")


_description = record(
    {
        "version": whole, "digests": map_of(text), "graph": _graph, "modules": list_of(_module),
        "names": map_of(text), "fingerprint": map_of(_mark), "info": optional(_info),
        "trace": optional(_trace),
    }
)  # fmt: skip
_layers = record({"layers": map_of(whole), "modules": list_of(_module), "tensors": map_of(text)})


def check_description(data: Any) -> None:
    """Raise a `LoadError` that says where unless `data` has the form of a description."""
    _check(_description, data, "description", "fxquant.save_model")


def check_layers(data: Any) -> None:
    """Raise a `LoadError` that says where unless `data` is what `describe_layers` gives."""
    _check(_layers, data, "quantized layers", "save_pretrained")


def _check(form: Form, data: Any, where: str, writer: str) -> None:
    try:
        form(data, where)
    except FormError as error:
        raise LoadError(
            where,
            found=str(error),
            needed=f"the form that {writer} writes",
            remedy="The file is damaged or hostile: save the model again.",
        ) from error
