"""Small models with the awkward habits of real ones."""

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 64


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, 96)
        self.norm = nn.LayerNorm(96)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(96, WIDTH)

    def forward(self, x):
        return self.second(self.dropout(F.gelu(self.norm(self.first(x)))))


class BranchingChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x):
        x = self.fc(x)
        if x.sum() > 0:
            x = self.block(x)
        return x * self.fc.in_features / WIDTH


class BranchInChild(nn.Module):
    def __init__(self):
        super().__init__()
        self.child = BranchingChild()
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.head(self.child(x))


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(torch.tanh(self.fc(x)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.decoder = nn.Linear(WIDTH, 50, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens):
        return self.decoder(self.fc(self.embedding(tokens)))


class BareParameters(nn.Module):
    """`F.linear`, `@` and `addmm` on parameters."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(96, WIDTH) / 8)
        self.shift = nn.Parameter(torch.randn(96))
        self.matrix = nn.Parameter(torch.randn(96, WIDTH) / 8)
        self.weight = nn.Parameter(torch.randn(WIDTH, 80) / 8)
        self.bias = nn.Parameter(torch.randn(80))

    def forward(self, x):
        x = F.linear(x, self.kernel, self.shift)
        x = x @ self.matrix
        rows = torch.addmm(self.bias, x.reshape(-1, WIDTH), self.weight)
        return rows.view(x.shape[0], -1, 80)


class Named(nn.Module):
    """Keyword arguments, a flag, and outputs by name."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, *, scale=None, double=False):
        y = self.fc(x)
        if scale is not None:
            y = y * scale
        if double:
            y = y * 2
        return {"y": y, "pair": (x, [y + 1])}


class NoneCheck(nn.Module):
    """Takes another way without a mask."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, mask=None):
        x = self.fc(x)
        return x if mask is None else x * mask


class LengthBranch(nn.Module):
    """Computes something else for long inputs."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.fc(x) if x.shape[1] > 8 else self.fc(x) * 2


class CrossAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, **options)

    def forward(self, x, memory):
        mixed, weights = self.attention(x, memory, memory)
        return mixed, weights
