import os
import pickle
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fxquant
from fxquant.errors import FxquantError, LoadError, SaveError
from fxquant.serialization import files
from tests import models
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)


class Pictures(nn.Module):
    """Convolutions, normalizations, a recurrent layer, constants and odd arguments."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.recurrent = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(32, 40), nn.GELU(approximate="tanh"))
        self.register_buffer("mask", torch.tensor([True, False] * 4), persistent=False)
        self.register_buffer("phase", torch.polar(torch.ones(40), torch.arange(40.0)))

    def forward(self, x):
        x = self.norm(self.convolution(x))[:, :, ::2, 1:9].clamp(-1.5, float("inf"))
        x = torch.where(self.mask[None, :, None, None], x, -x)
        x = F.avg_pool2d(x, (2, 1)).flatten(2)
        x, _ = self.recurrent(x.to(torch.float32))
        y = self.head(x)
        return {"y": y, "z": (y * self.phase).abs(), "size": y.shape[-1]}


def round_trip(gm, path, **options):
    files.save_model(gm, path, **options)
    return files.load_model(path, **options)


def test_convolutions_recurrent_layers_and_constants_come_back_bit_for_bit(tmp_path):
    model = Pictures().eval()
    x = torch.randn(2, 3, 16, 16)
    gm = fxquant.trace(model, x)
    loaded = round_trip(gm, tmp_path / "m.safetensors")
    with torch.no_grad():
        expected, found = model(x), loaded(x)
    assert torch.equal(found["y"], expected["y"])
    assert torch.equal(found["z"], expected["z"])
    assert found["size"] == expected["size"]
    assert loaded.code == gm.code


def test_ties_stay_ties_and_are_stored_once(tmp_path):
    path = tmp_path / "m.safetensors"
    loaded = round_trip(fxquant.trace(models.Tied()), path)
    assert loaded.embedding.weight is loaded.decoder.weight
    stored = sum(t.numel() for t in load_file(path).values())
    assert stored == 50 * WIDTH + WIDTH * WIDTH + WIDTH


def test_a_transposed_weight_keeps_its_layout(tmp_path):
    gm = fxquant.trace(models.BareParameters().eval(), X)
    loaded = round_trip(gm, tmp_path / "m.safetensors")
    assert loaded.matrix.weight.stride() == gm.matrix.weight.stride()
    assert torch.equal(loaded(X), gm(X))


def test_quantized_activations_and_the_record_come_back(tmp_path):
    q, info = fxquant.static_quantize(
        models.Plain(), [X], group_size=32, activation_bits=8, symmetric=False,
        accuracy_warning="ignore",
    )  # fmt: skip
    loaded = round_trip(q, tmp_path / "m.safetensors")
    assert torch.equal(loaded(X), q(X))
    record = loaded.meta["fxquant_info"]
    assert (
        record["config"]["bits"],
        record["config"]["group_size"],
        record["config"]["symmetric"],
    ) == (4, 32, False)
    assert [d["module"] for d in record["decisions"]] == [d.module for d in info.decisions]
    assert fxquant.trace_report(loaded) == fxquant.trace_report(q)


def test_an_opaque_module_is_refused_or_saved_by_its_class(tmp_path):
    model = models.BranchInChild().eval()
    gm = fxquant.trace(model)
    path = tmp_path / "m.safetensors"
    with pytest.raises(SaveError, match=r"child.*BranchingChild.*allow_modules=\(BranchingChild"):
        files.save_model(gm, path)
    assert not path.exists()
    allowed = (models.BranchingChild,)
    loaded = round_trip(gm, path, allow_modules=allowed)
    for x in (X, -X):
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(LoadError, match="BranchingChild.*If you trust the file"):
        files.load_model(path)


def scaled_by_hand(x):
    return x * 3


torch.fx.wrap("scaled_by_hand")


def test_an_unknown_function_is_refused_by_name_and_can_be_allowed(tmp_path):
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    with gm.graph.inserting_before(output):
        call = gm.graph.call_function(scaled_by_hand, (output.args[0],))
    output.args = (call,)
    gm.recompile()
    path = tmp_path / "m.safetensors"
    name = f"{__name__}.scaled_by_hand"
    with pytest.raises(SaveError, match="scaled_by_hand.*allow="):
        files.save_model(gm, path)
    loaded = round_trip(gm, path, allow=(name,))
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), gm(x))
    with pytest.raises(LoadError, match="scaled_by_hand.*If you trust the file"):
        files.load_model(path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "m.safetensors"
    q, info = fxquant.quantize(models.Plain(), group_size=32, accuracy_warning="ignore")
    files.save_model(q, path, info)
    return path


def rewritten(saved, path, change):
    """The saved file with its description changed by `change`."""
    description = files.read_description(saved)
    change(description)
    metadata = files.metadata_of(description)
    save_file(load_file(saved), path, metadata)
    return path


def first(description, op):
    return next(n for n in description["graph"]["nodes"] if n["op"] == op)


@pytest.mark.parametrize(
    "target",
    ["os.system", "torch.load", "torch.hub.load", "builtins.eval", "builtins.exec", "operator.call",
     "operator.attrgetter", "torch.from_file", "aten::from_file.default", "torch.save",
     "torch.compile", "torch.ops.load_library", "subprocess.run", "builtins.open",
     "torch.set_default_dtype", "fxquant.pipeline.quantize"],
)  # fmt: skip
def test_a_hostile_function_is_refused_by_name(saved, tmp_path, target):
    def change(description):
        first(description, "call_function")["target"] = target

    path = rewritten(saved, tmp_path / "h.safetensors", change)
    with pytest.raises(LoadError, match="not on the allow-list"):
        files.load_model(path)


@pytest.mark.parametrize("name", ["x; import os", "a.b", "__class__", "def", "", "é", "1 + 1", 3])
@pytest.mark.parametrize("key", ["name", "target"])
def test_names_cannot_carry_code(saved, tmp_path, name, key):
    def change(description):
        first(description, "placeholder")[key] = name

    with pytest.raises(LoadError):
        files.load_model(rewritten(saved, tmp_path / "h.safetensors", change))


def test_methods_and_attributes_with_side_effects_are_refused(saved, tmp_path):
    def call_method(description):
        node = first(description, "call_function")
        node.update(op="call_method", target="register_hook")

    def read_attribute(description):
        node = first(description, "call_function")
        node.update(target="builtins.getattr", args={"tuple": [{"node": 0}, "__class__"]})
        node["kwargs"] = {"dict": []}

    for change, text in ((call_method, "register_hook"), (read_attribute, "__class__")):
        with pytest.raises(LoadError, match=text):
            files.load_model(rewritten(saved, tmp_path / "h.safetensors", change))


def test_attributes_cannot_replace_methods(saved, tmp_path):
    def change(description):
        module = next(m for m in description["modules"] if "arguments" in m)
        module["arguments"]["dict"].append(["forward", "relu"])

    with pytest.raises(LoadError, match="forward"):
        files.load_model(rewritten(saved, tmp_path / "h.safetensors", change))


@pytest.mark.parametrize("name", ["forward", "_compiled_call_impl", "_call_impl", "training",
                                  "_forward_hooks", "__class__", "extra_repr"])  # fmt: skip
def test_attributes_of_an_allowed_class_cannot_replace_methods(tmp_path, name):
    allowed = (models.BranchingChild,)
    path = tmp_path / "m.safetensors"
    files.save_model(fxquant.trace(models.BranchInChild().eval()), path, allow_modules=allowed)

    def change(description):
        module = next(m for m in description["modules"] if "attributes" in m)
        module["attributes"][name] = {"value": 1}

    with pytest.raises(LoadError, match=name):
        files.load_model(rewritten(path, path, change), allow_modules=allowed)


def test_a_newer_version_asks_for_an_upgrade(saved, tmp_path):
    path = rewritten(saved, tmp_path / "n.safetensors", lambda d: d.update(version=99))
    with pytest.raises(LoadError, match="version 99.*Upgrade fxquant"):
        files.load_model(path)


def test_files_that_are_not_ours_say_so(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(LoadError, match="fxquant did not write"):
        files.load_model(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(LoadError, match="no safetensors file"):
        files.load_model(path)
    path.write_bytes(b"")
    with pytest.raises(LoadError, match="0 bytes"):
        files.load_model(path)
    with pytest.raises(LoadError, match="no such file"):
        files.load_model(tmp_path / "missing.safetensors")


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_bytes_never_raise_anything_but_a_load_error(saved, tmp_path, data):
    content = bytearray(saved.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        header = 8 + int.from_bytes(content[:8], "little")
        for _ in range(data.draw(st.integers(1, 4))):
            place = data.draw(st.integers(0, header - 1))
            content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    try:
        files.load_model(path)
    except LoadError as error:
        assert str(path) in str(error)


junk = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in pairs:
            yield from places(part, (*path, key))


@given(st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_mutated_description_never_raises_anything_but_a_load_error(saved, tmp_path, data):
    description = files.read_description(saved)
    paths = [p for p in places({k: description[k] for k in ("graph", "modules", "version")}) if p]
    *parents, last = data.draw(st.sampled_from(paths))
    holder = description
    for key in parents:
        holder = holder[key]
    holder[last] = data.draw(junk)
    metadata = files.metadata_of(description)
    path = tmp_path / "mutated.safetensors"
    save_file(load_file(saved), path, metadata)
    try:
        gm = files.load_model(path)
    except LoadError:
        return
    gm.graph.lint()


def test_a_failed_save_leaves_the_old_file_as_it_was(saved, tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved.read_bytes())
    gm = files.load_model(path)

    def full(tensors, file, metadata):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(SaveError, match="no space left.*free some space"):
        files.save_model(gm, path)
    assert path.read_bytes() == saved.read_bytes()
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_a_missing_folder_is_named(tmp_path):
    gm = fxquant.trace(models.Plain())
    with pytest.raises(SaveError, match="nowhere.*Create the folder"):
        files.save_model(gm, tmp_path / "nowhere" / "m.safetensors")
    with pytest.raises(SaveError, match="Plain.*GraphModule"):
        files.save_model(models.Plain(), tmp_path / "m.safetensors")


def test_a_killed_save_leaves_the_old_file_as_it_was(saved, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(saved.read_bytes())
    script = f"""
    import os, signal
    from fxquant.serialization import files
    gm = files.load_model({str(path)!r})
    def die(tensors, file, metadata):
        open(file, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    files.save_file = die
    files.save_model(gm, {str(path)!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert path.read_bytes() == saved.read_bytes()


def test_every_error_survives_pickling_between_processes():
    error = LoadError("a", found="b", needed="c", remedy="d")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, FxquantError)
    assert str(again) == str(error)
