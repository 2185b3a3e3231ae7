"""Saving behaves like a good tool, and copies of every kind carry the saved layout."""

import copy
import io
import multiprocessing
import operator
import os
import pickle
import signal
import stat
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save_model as save_with_safetensors
from torch import nn

import fxquant
from fxquant.errors import LoadError, SaveError
from fxquant.report.atomic import write_atomically
from fxquant.serialization import files
from tests import models
from tests.models import WIDTH

X = torch.randn(3, 5, WIDTH)


class Reads(nn.Module):
    """Calls a layer and reads its weight; names that Python does not allow; named results."""

    def __init__(self):
        super().__init__()
        self.add_module("fc-1", nn.Linear(WIDTH, WIDTH))
        self.add_module("tête", nn.Linear(WIDTH, 32))
        self.add_module("class", nn.ReLU())

    def forward(self, x):
        layer = getattr(self, "fc-1")
        x = getattr(self, "class")(layer(x)) + layer.weight.mean()
        top = self.get_submodule("tête")(x).topk(2, dim=-1)
        return {"values": top.values, "ones": x.new_ones(2), "drawn": torch.rand_like(x)}


@pytest.fixture(scope="module")
def q():
    made, _ = fxquant.quantize(models.Plain(), group_size=32, accuracy_warning="ignore")
    return made


def test_a_layer_that_is_called_and_read_and_odd_names_make_the_round_trip(tmp_path):
    made, _ = fxquant.static_quantize(
        Reads().eval(), [X], group_size=32, skip_param_threshold=0, accuracy_warning="ignore"
    )
    files.save_model(made, tmp_path / "m.safetensors")
    loaded = files.load_model(tmp_path / "m.safetensors")
    results = []
    for graph in (made, loaded, pickle.loads(pickle.dumps(made)), copy.copy(loaded)):
        torch.manual_seed(3)
        results.append(graph(X))
    for found in results[1:]:
        assert all(torch.equal(found[key], value) for key, value in results[0].items())


def test_the_target_of_a_link_is_replaced_and_its_mode_is_kept(q, tmp_path):
    target, link = tmp_path / "t.safetensors", tmp_path / "l.safetensors"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("t.safetensors")
    files.save_model(q, link)
    assert link.is_symlink()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert torch.equal(files.load_model(target)(X), q(X))
    assert sorted(os.listdir(tmp_path)) == ["l.safetensors", "t.safetensors"]


def test_a_link_to_nothing_is_written_through(q, tmp_path):
    link = tmp_path / "l.safetensors"
    link.symlink_to(tmp_path / "t.safetensors")
    files.save_model(q, link)
    assert link.is_symlink()
    assert files.load_model(tmp_path / "t.safetensors") is not None


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop"])
def test_what_is_no_file_is_refused_and_stays(q, tmp_path, kind):
    path = tmp_path / "m.safetensors"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    before = os.lstat(path)
    with pytest.raises(SaveError):
        files.save_model(q, path)
    with pytest.raises(LoadError):
        files.load_model(path)  # a FIFO would wait for ever if it was opened
    after = os.lstat(path)
    assert (after.st_mode, after.st_ino) == (before.st_mode, before.st_ino)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_the_longest_name_works(q, tmp_path):
    path = tmp_path / ("n" * (255 - len(".safetensors")) + ".safetensors")
    files.save_model(q, path)
    assert torch.equal(files.load_model(path)(X), q(X))


def test_what_a_killed_save_left_is_removed_by_the_next(tmp_path):
    path = tmp_path / "m.safetensors"
    script = f"""
    import os, signal
    from fxquant.report.atomic import write_atomically
    def die(file):
        open(file, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write_atomically({str(path)!r}, die)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert result.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 1
    write_atomically(tmp_path / "other", lambda file: None)  # not its business
    assert len(os.listdir(tmp_path)) == 2

    def write(file):
        # A second save at the same time leaves the first one's file alone.
        write_atomically(path, lambda inner: open(inner, "wb").close())
        with open(file, "wb") as handle:
            handle.write(b"whole")

    write_atomically(path, write)
    assert path.read_bytes() == b"whole"
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "other"]


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "m.safetensors"
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4)))
    gm.get_submodule("0").register_parameter("more", nn.Parameter(torch.ones(2)))
    with pytest.raises(SaveError, match="more"):
        files.save_model(gm, path)
    gm = torch.fx.symbolic_trace(nn.Sequential(nn.Conv2d(4, 4, 1)))
    gm.get_submodule("0").stride = "no stride"
    with pytest.raises(SaveError, match="no stride"):
        files.save_model(gm, path)
    gm.get_submodule("0").stride = (1, 1)
    files.save_model(gm, path)


def test_copies_of_graphs_compute_the_same(q, tmp_path):
    files.save_model(q, tmp_path / "m.safetensors")
    for graph in (q, copy.deepcopy(q), files.load_model(tmp_path / "m.safetensors")):
        expected = graph(X)
        assert torch.equal(pickle.loads(pickle.dumps(graph))(X), expected)
        assert torch.equal(copy.deepcopy(graph)(X), expected)
        buffer = io.BytesIO()
        torch.save(graph, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again(X), expected)
        files.save_model(again, tmp_path / "again.safetensors")
        first, second = (load_file(tmp_path / f"{n}.safetensors") for n in ("m", "again"))
        assert all(torch.equal(first[name], second[name]) for name in first | second)
        save_with_safetensors(again, str(tmp_path / "state.safetensors"))
        assert any("_packed_weight" in n for n in load_file(tmp_path / "state.safetensors"))


def test_a_swapped_model_can_be_pickled_and_saved_with_safetensors(tmp_path):
    torch.manual_seed(0)
    model = models.Plain().eval()
    made, _ = fxquant.quantize(model, group_size=32, accuracy_warning="ignore")
    swapped = fxquant.swap_modules(model, made)
    assert torch.equal(pickle.loads(pickle.dumps(swapped))(X), swapped(X))
    save_with_safetensors(swapped, str(tmp_path / "state.safetensors"))
    assert any("_packed_weight" in n for n in load_file(tmp_path / "state.safetensors"))


def test_a_spawned_worker_computes_the_same_bits(q):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        # Tests are not importable in the worker, so an importable function makes the call.
        assert torch.equal(pool.apply(operator.call, (q, X)), q(X))


def test_a_model_is_loaded_in_another_dtype(q, tmp_path):
    path = tmp_path / "m.safetensors"
    files.save_model(q, path)
    loaded = files.load_model(path, device="cpu", dtype=torch.bfloat16)
    y = loaded(X.bfloat16())
    assert y.dtype == torch.bfloat16
    assert (y.float() - q(X)).abs().max() < 0.1 * q(X).abs().max()
    kinds = {t.dtype for t in loaded.parameters() if t.is_floating_point()}
    assert kinds <= {torch.bfloat16}


def test_loading_leaves_the_random_state_alone(q, tmp_path):
    path = tmp_path / "m.safetensors"
    state = torch.get_rng_state()
    files.save_model(q, path)
    files.load_model(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_class_of_torch_nn_that_no_file_may_hold_is_refused_with_the_reason(tmp_path):
    model = nn.Sequential(nn.EmbeddingBag(10, 64), nn.Linear(64, 64))
    graph, info = fxquant.quantize(model, example_inputs=torch.zeros(2, 3, dtype=torch.long))
    with pytest.raises(SaveError) as error:
        fxquant.save_model(graph, tmp_path / "m.safetensors", info)
    assert "EmbeddingBag" in str(error.value)
    assert "reads memory at offsets that the file could choose" in str(error.value)
    assert not list(tmp_path.iterdir())


SAVES = """
import sys, torch, fxquant
from tests import models
torch.manual_seed(0)
q, info = fxquant.quantize(models.Plain(), group_size=32, accuracy_warning="ignore")
fxquant.save_model(q, sys.argv[1], info)
"""


def test_the_same_graph_gives_the_same_file_in_every_process(tmp_path):
    written = []
    for seed in "12":
        path = tmp_path / seed
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", SAVES, path], check=True, env=environment)
        written.append(path.read_bytes())
        files.save_model(files.load_model(path), path)  # and once more after loading
        written.append(path.read_bytes())
    assert len(set(written)) == 1
    assert load_file(tmp_path / "1").keys() == load_file(tmp_path / "2").keys()


def test_the_record_of_another_model_is_refused(q, tmp_path):
    other = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    _, info = fxquant.quantize(other, group_size=32, accuracy_warning="ignore")
    with pytest.raises(SaveError, match="the record of another model") as error:
        files.save_model(q, tmp_path / "m", info)
    assert "the graph carries its record" in str(error.value)
    assert not (tmp_path / "m").exists()
