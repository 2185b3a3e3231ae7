"""What a hostile file may not do: each list of what is allowed, tried from outside."""

import copy
import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxquant
from fxquant.errors import LoadError, RunError, SaveError
from fxquant.graph.saved_ops import (
    MAGIC_METHODS,
    TENSOR_OPS,
    WRITING_OPS,
    saved_functions,
    saved_methods,
)
from fxquant.serialization import allowlist, files
from fxquant.serialization.allowlist import check_method, function_name, resolve_function
from fxquant.serialization.layer_table import (
    KINDS,
    UNSUPPORTED_CLASSES,
    argument_names,
    torch_classes,
)
from fxquant.serialization.layers import UnfitError, construct, known_classes
from tests import models
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)
SPACES = (torch, torch.nn.functional, torch.linalg, torch.fft, torch.special, torch._C._nn,
          torch.functional, torch.utils, torch.hub, torch.jit, torch.serialization,
          torch.cuda, torch.random, torch.autograd, torch.sparse, torch.library)  # fmt: skip
# Words in the names of ops that reach beyond their tensors, or change the process.
FORBIDDEN = ("set_", "resize", "as_strided", "from_file", "storage", "data_ptr", "sparse",
             "quantize", "fbgemm", "mkldnn", "_cudnn", "seed", "pin_memory", "record_stream",
             "unsafe_tensor", "int8pack", "int4pack", "lstm", "gru", "rnn", "embedding_bag",
             "nested", "_reshape_alias", "coo", "csr", "grad_enabled", "load", "save", "compile",
             "_out", "backward", "module_load", "from_blob", "dlpack", "numpy")  # fmt: skip


def overloads():
    for name in dir(torch.ops.aten):
        packet = getattr(torch.ops.aten, name)
        if isinstance(packet, torch._ops.OpOverloadPacket):
            for overload in packet.overloads():
                yield name, overload, getattr(packet, overload)


def is_refused(name):
    try:
        resolve_function(name)
    except LoadError as error:
        return "not on the allow-list" in str(error)
    return False


@pytest.fixture
def no_guesses(monkeypatch):
    """To look for a similar name takes longest, and thousands of names are tried."""
    monkeypatch.setattr(allowlist, "near_misses", lambda *args, **kwargs: [])


@pytest.mark.usefixtures("no_guesses")
def test_every_aten_op_outside_the_table_is_refused_by_save_and_load():
    listed = TENSOR_OPS | WRITING_OPS | MAGIC_METHODS
    refused = 0
    for name, overload, op in overloads():
        short = name
        for prefix in ("linalg_", "fft_", "special_"):
            short = short.removeprefix(prefix)
        writes_out = any(a.is_out for a in op._schema.arguments)
        if short in listed and not writes_out:
            continue
        refused += 1
        assert is_refused(f"aten::{name}.{overload}"), name
        with pytest.raises(SaveError):
            function_name(op, "node x")
    assert refused > 1000


@pytest.mark.usefixtures("no_guesses")
def test_every_torch_function_outside_the_table_is_refused_by_save_and_load():
    allowed = {id(function) for function in saved_functions().values()}
    refused = 0
    for space in SPACES:
        for name in dir(space):
            value = getattr(space, name)
            if not callable(value) or id(value) in allowed:
                continue
            refused += 1
            assert is_refused(f"{space.__name__}.{name}"), (space, name)
            with pytest.raises(SaveError):
                function_name(value, "node x")
    assert refused > 1000


def test_every_method_of_a_tensor_outside_the_table_is_refused(saved, tmp_path):
    refused = [name for name in dir(torch.Tensor) if name not in saved_methods()]
    assert {"set_", "resize_", "data_ptr", "numpy", "as_strided", "register_hook", "apply_",
            "map_", "backward", "requires_grad_", "__reduce_ex__", "untyped_storage",
            "share_memory_", "type"} <= set(refused)  # fmt: skip
    for name in refused:
        with pytest.raises(LoadError):
            check_method(name, LoadError)
    for name in refused[::80]:  # through a whole file
        with pytest.raises(LoadError):
            load_with(saved, tmp_path, lambda d, name=name: set_call(d, "call_method", name))


def test_nothing_in_the_table_has_the_name_of_what_must_not_be_there():
    names = TENSOR_OPS | WRITING_OPS
    assert not [n for n in names for word in FORBIDDEN if word in n and n != "numpy_T"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("trust") / "m.safetensors"
    q, _ = fxquant.quantize(models.Plain(), group_size=32, accuracy_warning="ignore")
    files.save_model(q, path)
    return path


def load_with(saved, tmp_path, change, change_tensors=None):
    description = files.read_description(saved)
    change(description)
    tensors = load_file(saved)
    if change_tensors is not None:
        change_tensors(tensors)
        for name, tensor in tensors.items():
            description["digests"][name] = files._digest(name, tensor)
        description["digests"] = {k: v for k, v in description["digests"].items() if k in tensors}
    path = tmp_path / "h.safetensors"
    save_file(tensors, path, files.metadata_of(description))
    return files.load_model(path)


def set_call(description, op, target, *args, **kwargs):
    node = next(n for n in description["graph"]["nodes"] if n["op"] == "call_function")
    node.update(op=op, target=target)
    if args or kwargs:
        node["args"] = {"tuple": list(args)}
        node["kwargs"] = {"dict": [list(pair) for pair in kwargs.items()]}


INPUT = {"node": 0}


@pytest.mark.parametrize(
    ("op", "target", "args", "kwargs", "text"),
    [
        ("call_function", "aten::zeros.default", [[2]], {"layout": 1}, "layout"),
        ("call_function", "aten::zeros.default", [[2]], {"dtype": 13}, "dtype"),
        ("call_function", "torch.zeros", [2], {"dtype": {"dtype": "quint8"}}, "quint8"),
        ("call_function", "torch.zeros", [2], {"layout": {"layout": "sparse_coo"}}, "sparse_coo"),
        ("call_function", "torch.add", [INPUT, 1], {"out": INPUT}, "out="),
        ("call_function", "torch.rand", [2], {"generator": INPUT}, "generator="),
        ("call_function", "torch.zeros", [2], {"pin_memory": True}, "pin_memory"),
        ("call_method", "view", [INPUT, {"dtype": "bool"}], {}, "view as another dtype"),
        ("call_function", "aten::view.dtype", [INPUT, {"dtype": "uint8"}], {}, "view as another"),
        ("call_method", "to", [INPUT, {"device": "meta"}], {}, "meta"),
        ("call_function", "builtins.getattr", [INPUT, "__class__"], {}, "__class__"),
        ("call_function", "builtins.getattr", [INPUT, "grad_fn"], {}, "grad_fn"),
        ("call_function", "builtins.getattr", [INPUT, "_base"], {}, "_base"),
        ("call_function", "torch.relu", [{"function": "torch.load"}], {}, "torch.load"),
        ("call_function", "torch.relu", [{"device": "cpu; import os"}], {}, "import os"),
        ("call_function", "aten::add.Tensor", [INPUT, 1, 1, 1, 1], {}, "arguments"),
        ("call_function", "aten::add.Tensor", [INPUT], {}, "other"),
        ("call_function", "torch.nn.functional.dropout", [INPUT], {"x": 1}, "x"),
    ],
)  # fmt: skip
def test_arguments_that_a_file_may_not_hold_are_named(
    saved, tmp_path, op, target, args, kwargs, text
):
    with pytest.raises(LoadError, match=text):
        load_with(saved, tmp_path, lambda d: set_call(d, op, target, *args, **kwargs))


def test_a_dtype_read_from_a_tensor_cannot_reach_view(saved, tmp_path):
    def change(description):
        nodes = description["graph"]["nodes"]
        first = next(i for i, n in enumerate(nodes) if n["op"] == "call_function")
        nodes[first].update(target="builtins.getattr", args={"tuple": [INPUT, "dtype"]})
        nodes[first]["kwargs"] = {"dict": []}
        nodes[-1].update(args={"tuple": [{"node": first}]})
        view = {**nodes[first], "op": "call_method", "target": "view", "name": "view"}
        view["args"] = {"tuple": [INPUT, {"node": first}]}
        nodes.insert(-1, view)

    with pytest.raises(LoadError, match="dtype"):
        load_with(saved, tmp_path, change)


@pytest.mark.parametrize("name", sorted(known_classes()))
def test_no_attribute_of_any_allowed_class_can_be_set(saved, tmp_path, name):
    cls = known_classes()[name]

    def change(description, key):
        module = next(m for m in description["modules"] if "arguments" in m)
        module.update({"class": name, "parameters": {}, "buffers": {}, "children": {}})
        module["empty"] = [[], []]
        module["arguments"] = {"dict": [[key, 1]]}

    names = {*dir(cls), *vars(nn.Module()), "forward", "_compiled_call_impl"}
    if name in torch_classes():
        names -= set(argument_names(cls))
    for key in sorted(names):
        for value in (1, "text", True, None):
            with pytest.raises(UnfitError):
                construct(cls, {key: value})
    for key in sorted(names)[:: max(1, len(names) // 2)]:  # through a whole file
        with pytest.raises(LoadError):
            load_with(saved, tmp_path, lambda d, key=key: change(d, key))


def test_every_class_of_torch_nn_is_listed_or_left_out_with_a_reason():
    known = set(known_classes().values())
    for name, cls in vars(nn).items():
        if isinstance(cls, type) and issubclass(cls, nn.Module):
            assert (cls in known) != (name in UNSUPPORTED_CLASSES), name
    assert all(UNSUPPORTED_CLASSES.values())


def test_every_argument_of_every_class_has_a_type_and_a_range():
    for cls in torch_classes().values():
        for name in argument_names(cls):
            assert name in KINDS, (cls, name)
            for value in (print, nn.ReLU(), object(), "os.system", float("nan"), 1 << 70, {}):
                assert not KINDS[name](value), (cls, name, value)


def test_the_weights_of_a_recurrent_layer_cannot_be_cut(tmp_path):
    path = tmp_path / "m.safetensors"
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.LSTM(8, 8)))
    files.save_model(gm, path)

    def cut(tensors):
        name = next(n for n in tensors if "weight_hh" in n)
        tensors[name] = tensors[name][:3].contiguous()

    with pytest.raises(LoadError, match="weight_hh_l0: shape"):
        load_with(path, tmp_path, lambda d: None, cut)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.update(extra=torch.ones(2)), "extra"),
        (lambda t: t.pop("block.scales", None) or t.pop(next(iter(t))), "not in the file"),
        (lambda t: t.update({k: v.zero_() for k, v in t.items() if k.endswith("scales")}),
         "a scale that is 0"),
        (lambda t: t.update({k: v[:1] for k, v in t.items() if k.endswith("bias")}), "bias"),
        (lambda t: t.update({k: v.float() for k, v in t.items() if v.dtype == torch.uint8}),
         "float32"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(saved, tmp_path, change, text):
    with pytest.raises(LoadError, match=text):
        load_with(saved, tmp_path, lambda d: None, change)


def test_each_flipped_bit_is_noticed_and_its_tensor_named(saved, tmp_path):
    content = saved.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:begin])
    path = tmp_path / "flipped.safetensors"
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(0, 8 * len(content), (400,), generator=generator).tolist():
        data = bytearray(content)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        with pytest.raises(LoadError) as caught:
            files.load_model(path)
        where = place // 8 - begin
        if where >= 0:
            name = next(
                n for n, e in header.items()
                if n != "__metadata__" and e["data_offsets"][0] <= where < e["data_offsets"][1]
            )  # fmt: skip
            assert repr(name) in str(caught.value)


def test_a_digest_covers_long_tensors_and_the_order_of_their_blocks():
    from_seed = torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 256, (500_001,), dtype=torch.uint8, generator=from_seed)
    seen = {files.digest_of("t", "U8", tensor)}
    changed = tensor.clone()
    changed[:131072], changed[131072:262144] = tensor[131072:262144], tensor[:131072]
    seen.add(files.digest_of("t", "U8", changed))
    for place in (0, 131071, 131072, 393216, 500_000):
        changed = tensor.clone()
        changed[place] ^= 64
        seen.add(files.digest_of("t", "U8", changed))
    seen.add(files.digest_of("u", "U8", tensor))
    seen.add(files.digest_of("t", "I8", tensor))
    assert len(seen) == 9


def test_a_file_of_the_first_version_says_what_to_do(saved, tmp_path):
    with pytest.raises(LoadError, match="version 1.*save it again"):
        load_with(saved, tmp_path, lambda d: d.update(version=1))


class Unflattens(nn.Module):
    def forward(self, x):
        return x.relu().unflatten(-1, (4, 16)).sum(-1)


def test_a_failure_while_running_names_the_node(saved, tmp_path):
    with pytest.raises(RunError, match="the call of the graph.*missing 1 required"):
        files.load_model(saved)()
    path = tmp_path / "m.safetensors"
    traced = fxquant.trace(Unflattens(), torch.ones(2, 64))
    files.save_model(traced, path)
    loaded = files.load_model(path)
    assert torch.equal(loaded(torch.ones(2, 64)), traced(torch.ones(2, 64)))
    with pytest.raises(RunError, match=r"node unflatten\S* \(call_.*RuntimeError") as caught:
        loaded(torch.ones(2, 63))
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(RuntimeError, match="unflatten"):  # code that catches torch's error works
        copy.deepcopy(loaded)(torch.ones(2, 63))


INFO_FAULTS = {
    "a number as a name": lambda info: info["decisions"][0].update(module=3),
    "a list as a reason": lambda info: info["decisions"][0].update(reason=["x"]),
    "an unknown key": lambda info: info.update(callback="os.system"),
    "an unknown key of a row": lambda info: info["rows"][0].update(__class__="x"),
    "a shape of texts": lambda info: info["rows"][0].update(shape=["1", "2"]),
    "a text as SQNR": lambda info: info.update(sqnr_db="very good"),
    "a width that is no number": lambda info: info["rows"][0].update(output_errors={"four": 1.0}),
    "a row without a module": lambda info: info["rows"][0].pop("module"),
    "a scale of numbers": lambda info: info.update(folded_scales=[{"producers": [1]}]),
    "a norm without a layer": lambda info: info.update(folded_norms=[{"norm": "bn", "eps": 1e-5}]),
    "a trace of another form": lambda info: info.update(trace={"way": 1}),
    "a mapping of bits to texts": lambda info: info.update(bits={"fc": "4"}),
    "endless nesting": lambda info: info["trace"].update(attempts=[[[]]]),
    "no decisions": lambda info: info.pop("decisions"),
}


@pytest.mark.parametrize("name", INFO_FAULTS)
def test_a_record_of_another_form_is_refused(tmp_path, name):
    path = tmp_path / "model.safetensors"
    graph, info = fxquant.quantize(models.Plain(), group_size=32, accuracy_warning="ignore")
    fxquant.save_model(graph, path, info)
    with pytest.raises(LoadError, match="description"):
        load_with(path, tmp_path, lambda d: INFO_FAULTS[name](d["info"]))
