"""A swapped copy rounds what its layers read where the graph does, or says where it does not."""

import copy
import tempfile
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxquant
from fxquant.modules.rounded_input import RoundedInput
from fxquant.swap import LeftFloatWarning


class Convolutions(nn.Module):
    """Convolutions, one of them grouped, and a linear layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.linear = nn.Linear(8, 5)
        self.again = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.grouped(torch.relu(self.conv(x))).mean((2, 3)))
        return self.again(torch.relu(self.again(y)))


class Tied(nn.Module):
    """An embedding that is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Bare(nn.Module):
    """A layer, attention of torch's, and a parameter that the model's own code multiplies with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.linear(x))
        return self.attention(y, y, y, need_weights=False)[0] @ self.table


class Experts(nn.Module):
    """Matrices of which each row of a batch meets one, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(
            torch.relu(self.linear(x)).unflatten(0, (2, -1)).flatten(1, -2), self.table
        )


def images() -> list[Tensor]:
    return [torch.randn(4, 3, 10, 10) for _ in range(20)]


def tokens() -> list[Tensor]:
    return [torch.randint(40, (4, 6)) for _ in range(20)]


def rows() -> list[Tensor]:
    return [torch.randn(4, 16) for _ in range(20)]


def sequences() -> list[Tensor]:
    return [torch.randn(4, 5, 16) for _ in range(20)]


class EachExpert(nn.Module):
    """Matrices of one parameter, each with an input of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.table = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.linear(x))
        return torch.relu(y @ self.table[0]) @ self.table[1]


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Tensor]]]] = {
    "convolutions": (Convolutions, images),
    "tied head": (Tied, tokens),
    "a layer by itself": (lambda: nn.Linear(16, 16), rows),
    "bare": (Bare, sequences),
    "experts": (Experts, sequences),
    "each expert": (EachExpert, sequences),
}
OPTIONS = {
    "bits": 8, "embeddings": 8, "activation_bits": 8, "skip_layer_names": (),
    "skip_param_threshold": 0, "accuracy_warning": "ignore",
}  # fmt: skip


def quantized(name: str, **options: object) -> tuple[nn.Module, GraphModule, Tensor]:
    torch.manual_seed(0)
    make, batches = MODELS[name]
    model, data = make().eval(), batches()
    graph, _ = fxquant.quantize(model, data, **{**OPTIONS, **options})
    return model, graph, data[0]


@pytest.mark.parametrize(
    "name", ["convolutions", "tied head", "a layer by itself", "bare", "experts"]
)
def test_the_copy_of_a_graph_with_static_activations_has_the_graphs_bits(name: str) -> None:
    model, graph, x = quantized(name)
    with warnings.catch_warnings(action="error", category=LeftFloatWarning):
        swapped = fxquant.swap_modules(model, graph)
    assert any(isinstance(module, RoundedInput) for module in swapped.modules())
    assert swapped.fxquant_float_inputs == []
    assert torch.equal(swapped(x), graph(x))
    assert torch.equal(copy.deepcopy(swapped)(x), graph(x))


def test_a_model_that_is_loaded_into_rounds_its_inputs_too() -> None:
    _, graph, x = quantized("convolutions")
    with tempfile.TemporaryDirectory() as folder:
        fxquant.save_model(graph, f"{folder}/model.fxq")
        loaded = fxquant.load_into(Convolutions().eval(), f"{folder}/model.fxq")
    assert torch.equal(loaded(x), graph(x))


def test_what_the_graph_rounds_and_the_copy_cannot_is_named() -> None:
    model, graph, _ = quantized("each expert")
    with pytest.warns(LeftFloatWarning, match="is rounded in the graph alone: table_2, table_3"):
        swapped = fxquant.swap_modules(model, graph)
    assert swapped.fxquant_float_inputs == ["table_2", "table_3"]
    assert isinstance(swapped.linear, RoundedInput)


def test_dynamic_activations_need_no_layer_around() -> None:
    model, graph, x = quantized("convolutions", observer="dynamic")
    swapped = fxquant.swap_modules(model, graph)
    assert not any(isinstance(module, RoundedInput) for module in swapped.modules())
    assert torch.equal(swapped(x), graph(x))


def test_a_cast_leaves_the_grid_and_what_reads_sizes_finds_them() -> None:
    model, graph, _ = quantized("convolutions")
    swapped = fxquant.swap_modules(model, graph)
    cast = copy.deepcopy(swapped).bfloat16()
    assert torch.equal(cast.linear.scale, swapped.linear.scale)
    assert cast.linear.scale.dtype is torch.float32
    assert (cast.linear.in_features, cast.conv.kernel_size) == (8, (3, 3))
    assert cast.linear.weight.shape == (5, 8)
    with pytest.raises(AttributeError, match="nothing"):
        _ = cast.linear.nothing


def test_a_format_without_static_ranges_refuses_the_copy_as_it_does_the_graph() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16)).eval()
    graph, _ = fxquant.quantize(model, rows(), **OPTIONS)
    swapped = fxquant.swap_modules(model, graph)
    for exported in (graph, swapped):
        assert "activations" in {f.where for f in fxquant.check_export(exported, "gptq")}


def test_a_folder_of_transformers_has_the_grids() -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("fxquant.integrations.transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        vocab_size=50,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    batches = [{"input_ids": torch.randint(50, (4, 12))} for _ in range(20)]
    graph, _ = fxquant.quantize(model, batches, **OPTIONS)
    swapped = fxquant.swap_modules(model, graph)
    assert torch.equal(swapped(**batches[0])[0], graph(**batches[0])[0])
    with tempfile.TemporaryDirectory() as folder:
        swapped.save_pretrained(folder)
        loaded = transformers.AutoModel.from_pretrained(folder)
    assert isinstance(loaded.encoder.layer[0].output.dense, RoundedInput)
    assert torch.equal(loaded(**batches[0])[0], swapped(**batches[0])[0])


def test_a_grid_that_is_no_tensor_of_the_graph_is_not_taken() -> None:
    model, graph, _ = quantized("a layer by itself")
    (rounded,) = (n for n in graph.graph.nodes if "dequantize" in n.name)
    value = next(n for n in graph.graph.nodes if n.op == "placeholder")
    rounded.args = (rounded.args[0], value, *rounded.args[2:])  # as a damaged file may have it
    with pytest.warns(LeftFloatWarning, match="is rounded in the graph alone"):
        swapped = fxquant.swap_modules(model, graph)
    assert swapped.fxquant_float_inputs
