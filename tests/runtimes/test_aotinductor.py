"""The example of a C++ program that runs a compiled model, without Python."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import fxquant
from tests.examples import FOLDER

LEAST_DB = 110  # the same weights; the compiler orders sums in another way


class Labelled(nn.Module):
    """Two layers of 4 and 3 bits, an embedding, and two outputs."""

    def __init__(self):
        super().__init__()
        self.label = nn.Embedding(10, 256)
        self.first, self.last = nn.Linear(256, 512), nn.Linear(512, 64)
        self.norm = nn.LayerNorm(512)

    def forward(self, x, label):
        hidden = torch.relu(self.norm(self.first(x + self.label(label)[:, None])))
        return self.last(hidden), hidden


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """The example, compiled as its README says."""
    path, torch_folder = tmp_path_factory.mktemp("program") / "run", Path(torch.__file__).parent
    readme = (FOLDER / "aotinductor" / "README.md").read_text()
    command = re.search(r"^g\+\+ .*?[^\\]$", readme, re.MULTILINE | re.DOTALL)[0]
    command = command.replace("$TORCH", str(torch_folder)).replace("-o run", f"-o {path}")
    subprocess.run(command, shell=True, cwd=FOLDER / "aotinductor", check=True)
    return path


@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_program_without_python_runs_a_compiled_model(program, tmp_path):
    torch.manual_seed(0)
    model, example = Labelled().eval(), (torch.randn(2, 5, 256), torch.tensor([1, 7]))
    graph, _ = fxquant.quantize(
        model, example_inputs=example, bits={"first": 4, "last": 3}, group_size=32,
        skip_param_threshold=0, accuracy_warning="ignore",
    )  # fmt: skip
    fxquant.export(graph, tmp_path / "model.pt2", format="pt2", standard=True)
    exported = torch.export.load(tmp_path / "model.pt2")
    compiled = tmp_path / "compiled.pt2"
    torch._inductor.aoti_compile_and_package(exported, package_path=str(compiled))
    inputs = [torch.randn(3, 9, 256), torch.tensor([0, 4, 9])]  # another batch and length
    torch.save(inputs, tmp_path / "inputs.pt")
    files = [compiled, tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    subprocess.run([program, *files], check=True, env={"PATH": "", "TMPDIR": str(tmp_path)})
    found = torch.load(tmp_path / "outputs.pt")
    for one, other in zip(found, graph(*inputs), strict=True):
        assert fxquant.sqnr_db(other, one) > LEAST_DB
    linked = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    assert "libtorch_cpu" in linked
    assert "python" not in linked.replace(str(Path(torch.__file__).parent), "")


def test_a_file_that_is_no_model_is_an_error_in_words(program, tmp_path):
    (tmp_path / "no.pt2").write_text("no model")
    run = [program, tmp_path / "no.pt2", tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    found = subprocess.run(run, check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "Failed to initialize zip archive: not a ZIP archive\n"
