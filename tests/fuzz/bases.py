"""The honest files that are mutated: small models with modules and ops of every kind."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxquant

OPTIONS: dict[str, Any] = {
    "group_size": 16, "skip_param_threshold": 0, "accuracy_warning": "ignore",
}  # fmt: skip


class Sentences(nn.Module):
    """Embeddings, a recurrent layer, attention, a read of a weight, named results."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 32)
        self.recurrent = nn.LSTM(32, 16, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 20)
        self.register_buffer("phase", torch.polar(torch.ones(20), torch.arange(20.0)))

    def forward(self, tokens: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.embedding(tokens)
        x = self.recurrent(x)[0] * scale
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        y = self.head(x)
        top = y.topk(3, dim=-1)
        z = torch.zeros_like(y).scatter_(-1, top.indices, 1.0)
        z = z.masked_fill(y > 0, 0.5)
        return {"y": y, "top": top.values, "z": (z * self.phase).abs(), "w": self.head.weight.sum()}


class Images(nn.Module):
    """Convolutions, pooling, padding, indexing, and ops that write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 24)
        self.wide = nn.Linear(24, 32)
        self.register_buffer("order", torch.tensor([2, 0, 1, 3]))

    def forward(self, x: Tensor) -> Any:
        x = self.pool(self.norm(self.convolution(x)).relu_())
        x = F.pad(x, (1, 1)).index_select(2, self.order)[:, :, ::2, 1:-1]
        x = F.interpolate(x, scale_factor=2.0).flatten(2).transpose(1, 2)
        x = self.drop(F.gelu(self.fc(x))).clamp(-3, float("inf"))
        x = torch.cat((x, x.new_ones(x.shape[0], 1, 24)), dim=1)
        return self.wide(x).softmax(-1), x.mean(), x.sum(1, keepdim=True).expand(-1, 3, -1)


class Branches(nn.Module):
    """A check of the length, which only an export can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, float("-inf"))
        if x.shape[1] > 1:
            x = x + self.first(scores.softmax(-1) @ x)
        x = torch.where(x > 0, x, x * 0.1)
        return self.second(x.unflatten(-1, (4, 8)).permute(0, 2, 1, 3).flatten(2))


@dataclass(frozen=True)
class Base:
    """A file, the model it came from and a call."""

    name: str
    model: nn.Module
    graph: Any
    arguments: tuple[Any, ...]


def bases() -> list[Base]:
    """The graphs of which files are made."""
    torch.manual_seed(0)
    tokens, image, rows = (
        torch.randint(0, 20, (2, 5)),
        torch.randn(1, 3, 8, 8),
        torch.randn(2, 4, 32),
    )
    made = []
    for model, x, options in (
        (Sentences(), tokens, {"bits": {"head": 8}, "symmetric": False}),
        (Images(), image, {"activation_bits": 8}),
        (Branches(), rows, {}),
    ):
        model.eval()
        graph, _ = fxquant.static_quantize(copy.deepcopy(model), [(x,)], **{**OPTIONS, **options})
        made.append(Base(type(model).__name__, model, graph, (x,)))
    layers = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 32)).eval()
    observed = fxquant.insert_observers(fxquant.trace(layers, rows), "histogram", bins=16)
    fxquant.calibrate(observed, [rows])
    made.append(Base("Observed", layers, observed, (rows,)))
    return made
