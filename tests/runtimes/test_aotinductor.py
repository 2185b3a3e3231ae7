"""The example of a C++ program that runs compiled models without Python, and its library."""

import re
import subprocess
import sys
from itertools import cycle, product
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

import fxquant
from fxquant.graph.structures import tensors_in
from fxquant.modules.linear_intn import QuantizedLinearIntN
from fxquant.numerics.integers import WIDTHS
from tests.examples import FOLDER

LEAST_DB = 110  # the same weights; the compiler orders sums in another way
TYPES = (torch.float32, torch.bfloat16, torch.float16)
QUANTIZED = {"skip_param_threshold": 0, "group_size": 32, "accuracy_warning": "ignore"}

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler


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


class Kinds(nn.Module):
    """A layer of every width, with and without zero points, on floats and on int8, in each type."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        group_sizes, biases = cycle((32, 64, 128, -1)), cycle((True, False, True))
        self.layers = nn.ModuleList()
        for dtype, bits, symmetric, activation in product(
            TYPES, WIDTHS, (True, False), ("float", "int8")
        ):
            linear = nn.Linear(160, 70, bias=next(biases)).to(dtype)
            layer = QuantizedLinearIntN.rounded(linear, bits, next(group_sizes), symmetric)
            layer.activation = activation
            self.layers.append(layer)

    def forward(self, *values):
        of_type = len(self.layers) // len(TYPES)
        return tuple(layer(values[i // of_type]) for i, layer in enumerate(self.layers))


class Mixture(nn.Module):
    """A convolution, an embedding, grouped attention and experts; gives logits."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mix = nn.Conv1d(64, 64, 3, padding=1)
        self.model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
            )
        )  # fmt: skip

    def forward(self, ids):
        embedded = self.model.get_input_embeddings()(ids)
        mixed = self.mix(embedded.transpose(1, 2)).transpose(1, 2).contiguous()
        return self.model(inputs_embeds=mixed, use_cache=False).logits


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The example and the library, compiled as its README says: two paths."""
    folder = tmp_path_factory.mktemp("program")
    commands = re.search(r"```sh\n(TORCH=.*?)build/run", README, re.DOTALL)[1]
    commands = commands.replace("python ", f"{sys.executable} ").replace("build ", f"{folder} ")
    subprocess.run(
        ["bash", "-ec", commands.replace(f"--{folder} ", "--build ")],
        cwd=FOLDER / "aotinductor", check=True,
    )  # fmt: skip
    return folder / "run", folder / "fxquant" / "libfxquant_torch.so"


README = (FOLDER / "aotinductor" / "README.md").read_text()


def compiled(model, folder, **options):
    """The path of the compiled program of a model."""
    fxquant.export(model, folder / "model.pt2", format="pt2", **options)
    program = torch.export.load(folder / "model.pt2")
    path = folder / "compiled.pt2"
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    return path


def outputs_of(run, path, inputs, *libraries):
    """What the C++ program writes, in a process that could not find Python."""
    folder = path.parent
    torch.save(list(inputs), folder / "inputs.pt")
    files = [path, folder / "inputs.pt", folder / "outputs.pt", *libraries]
    subprocess.run([run, *files], check=True, env={"PATH": "", "TMPDIR": str(folder)})
    return torch.load(folder / "outputs.pt")


@pytest.mark.usefixtures("float32_products")
def test_a_standard_program_needs_no_library(built, tmp_path):
    torch.manual_seed(0)
    model, example = Labelled().eval(), (torch.randn(2, 5, 256), torch.tensor([1, 7]))
    graph, _ = fxquant.quantize(
        model, example_inputs=example, bits={"first": 4, "last": 3}, **QUANTIZED
    )
    inputs = [torch.randn(3, 9, 256), torch.tensor([0, 4, 9])]  # another batch and length
    found = outputs_of(built[0], compiled(graph, tmp_path, standard=True), inputs)
    for one, other in zip(found, graph(*inputs), strict=True):
        assert fxquant.sqnr_db(other, one) > LEAST_DB
    for file in built:
        linked = subprocess.run(["ldd", file], check=True, capture_output=True, text=True).stdout
        assert "libtorch_cpu" in linked
        assert "python" not in linked.replace(str(Path(torch.__file__).parent), "")


def test_every_kind_of_product_has_the_bits_that_it_has_in_python(built, tmp_path):
    model = Kinds().eval()
    example = [torch.randn(2, 5, 160).to(dtype) for dtype in TYPES]
    path = compiled(model, tmp_path, example_inputs=tuple(example))
    assert {layer.backend for layer in model.layers} == {"native"}
    for shape in ((1, 1), (3, 9), (40, 50)):
        inputs = [3 * torch.randn(*shape, 160).to(dtype) for dtype in TYPES]
        found = outputs_of(built[0], path, inputs, built[1])
        expected = model(*inputs)
        assert [torch.equal(one, y) for one, y in zip(found, expected, strict=True)] == [
            True
        ] * len(model.layers)


@pytest.mark.parametrize(
    "options",
    [
        {"embeddings": 8, "fuse": True},
        {"bits": 8, "activation_bits": 8, "observer": "minmax"},
    ],
    ids=str,
)
def test_a_whole_model_has_the_bits_that_it_has_in_python(options, built, tmp_path):
    """Its attention, experts, convolution and embedding are in the program, too."""
    example, inputs = torch.arange(10).view(2, 5), torch.arange(27).view(3, 9)
    chosen = {**QUANTIZED, **options}
    is_fused = chosen.pop("fuse", False)
    graph, _ = fxquant.quantize(Mixture().eval(), [example], **chosen)
    graph = fxquant.fuse(graph) if is_fused else graph
    found = outputs_of(built[0], compiled(graph, tmp_path), [inputs], built[1])
    for one, other in zip(found, tensors_in(graph(inputs)), strict=True):
        assert torch.equal(one, other)


def test_what_is_missing_is_said_as_the_readme_does(built, tmp_path):
    run = built[0]
    (tmp_path / "no.pt2").write_text("no model")
    files = [tmp_path / "no.pt2", tmp_path / "inputs.pt", tmp_path / "outputs.pt"]
    found = subprocess.run([run, *files], check=False, capture_output=True, text=True)
    assert found.returncode == 1
    assert found.stderr == "Failed to initialize zip archive: not a ZIP archive\n"
    model = nn.Sequential(QuantizedLinearIntN.rounded(nn.Linear(64, 64), 4))
    files[0] = compiled(model, tmp_path, example_inputs=torch.ones(2, 64))
    for library, text in [
        ([], "Could not find schema for fxquant::linear_intn."),
        (["libfxquant_torch.so"], "libfxquant_torch.so: cannot open shared object file"),
    ]:
        found = subprocess.run([run, *files, *library], check=False, capture_output=True, text=True)
        assert found.returncode == 1
        assert found.stderr.startswith(text)
        assert text in README


@pytest.mark.parametrize("is_first", [True, False], ids=["opened first", "opened last"])
def test_a_process_with_fxquant_may_open_the_library_too(is_first, built):
    """The operators are then registered twice, and one registration gives way."""
    code = f"""
import warnings; warnings.simplefilter("error")
import torch
if {is_first}: torch.ops.load_library({str(built[1])!r})
from fxquant.kernels.operators import ATTENTION, LINEAR_INTN
from fxquant.kernels.attention import attention
from fxquant.kernels.native import _form
from fxquant.modules.linear_intn import QuantizedLinearIntN
if not {is_first}: torch.ops.load_library({str(built[1])!r})
layer = QuantizedLinearIntN.rounded(torch.nn.Linear(64, 96), 4)
x = torch.randn(3, 64)
form = layer.packed_memory, layer.bias, *_form(layer.spec)
assert torch.equal(LINEAR_INTN(x, *form), layer(x))
try: LINEAR_INTN(x[:, :32], *form)
except (RuntimeError, ValueError) as error: print(error)
layer(x.requires_grad_()).sum().backward()
assert torch.allclose(x.grad, layer.dequantize().sum(0).expand(3, 64), atol=1e-4)
q, k = torch.randn(2, 4, 9, 16), torch.randn(2, 2, 9, 16)
for mask in (None, torch.randn(9, 9) > 0, torch.randn(9, 9)):
    assert torch.equal(ATTENTION(q, k, k, mask, False, None), attention(q, k, k, mask))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "fxquant::linear_intn: " in run.stdout
    assert "[3, 32]" in run.stdout
    assert run.stderr == ""
