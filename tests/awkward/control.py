"""Branches, loops and looks at values in forward."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward, rows


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)


@awkward()
class BranchesOnTheMean(Base):
    """Another way for inputs with a positive mean."""

    def forward(self, x):
        if x.mean() > 0:
            return self.second(torch.relu(self.first(x)))
        return self.first(x) - self.second(x)


@awkward()
class BranchesOnAnItem(Base):
    """A number taken out of a tensor decides and scales."""

    def forward(self, x):
        h = self.first(x)
        largest = h.abs().max().item()
        return self.second(h / largest) if largest > 1 else self.second(h)


@awkward()
class BranchesInAChildOnly(nn.Module):
    """A child with a branch between plain layers."""

    def __init__(self):
        super().__init__()
        self.before, self.child, self.after = (
            nn.Linear(W, W), BranchesOnTheMean(), nn.Linear(W, W),
        )  # fmt: skip

    def forward(self, x):
        return self.after(self.child(self.before(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))

    def forward(self, x):
        return x + self.mlp(x)


@awkward(own=True)
class EarlyExit(nn.Module):
    """Leaves after a block when it is sure enough."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            if float(x.abs().max()) > 1e9:
                return x
        return x


@awkward()
class LoopsOverTheLength(Base):
    """A recurrence over the positions."""

    def forward(self, x):
        h = torch.zeros(x.shape[0], W)
        outputs = []
        for t in range(x.shape[1]):
            h = torch.tanh(self.first(x[:, t]) + self.second(h))
            outputs.append(h)
        return torch.stack(outputs, 1)


@awkward()
class IteratesOverATensor(Base):
    """`for row in x`, and a comprehension over zip."""

    def forward(self, x):
        kept = [self.first(row) for row in x]
        return self.second(torch.stack([torch.relu(a) + b for a, b in zip(kept, x, strict=True)]))


@awkward()
class RepeatsUntil(Base):
    """A while loop whose number of rounds depends on the data."""

    def forward(self, x):
        rounds = 0
        while x.norm() > 4 and rounds < 5:
            x = 0.5 * torch.tanh(self.first(x))
            rounds += 1
        return self.second(x) + rounds


@awkward()
class BranchesOnTheLength(Base):
    """Something else for more than six positions."""

    def forward(self, x):
        return self.second(self.first(x)) if x.shape[1] > 6 else self.second(torch.relu(x)) * 2


@awkward()
class BranchesOnTheBatch(Base):
    """Something else for a batch of one."""

    def forward(self, x):
        h = self.first(x)
        if len(x) == 1:
            h = h - h.mean(1, keepdim=True)
        return self.second(h)


@awkward()
class PadsToFour(Base):
    """The length is padded to a multiple of four and cut again."""

    def forward(self, x):
        n = x.shape[1]
        pad = -n % 4
        if pad:
            x = F.pad(x, (0, 0, 0, pad))
        windows = self.first(x).view(x.shape[0], -1, 4, W)
        mixed = windows + windows.mean(2, keepdim=True)
        return self.second(mixed.flatten(1, 2)[:, :n])


@awkward()
class ComputesWithShapes(Base):
    """Unpacked shapes, integer division, a shape in a scale."""

    def forward(self, x):
        b, n, c = x.shape
        heads = self.first(x).view(b, n, 4, c // 4).transpose(1, 2)
        scores = heads @ heads.transpose(-1, -2) / (c // 4) ** 0.5 / n
        return self.second((scores.softmax(-1) @ heads).transpose(1, 2).reshape(b, n, c))


@awkward()
class RefusesLongInputs(Base):
    """Raises for lengths that it does not take, and asserts about values."""

    def forward(self, x):
        if x.shape[1] > 30:
            raise ValueError("too long")
        assert torch.isfinite(x).all(), "not finite"
        return self.second(torch.relu(self.first(x)))


@awkward()
class CorrelatesInFrequencies(Base):
    """An autocorrelation by Fourier transforms, of finite inputs alone."""

    def forward(self, x):
        if not torch.isfinite(x).all():
            raise ValueError("not finite")
        spectrum = torch.fft.rfft(self.first(x), dim=1)
        lags = torch.fft.irfft(spectrum * spectrum.conj(), n=x.shape[1], dim=1)
        return self.second(lags / x.shape[1])


@awkward()
class LooksAtModes(Base):
    """Asks for training, gradients, scripting, export and compilation."""

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            x = x + torch.randn_like(x)
        if torch.jit.is_scripting() or torch.compiler.is_compiling():
            return self.second(self.first(x))
        return self.second(torch.relu(self.first(x)))


@awkward()
class Tries(Base):
    """A try block that swallows an error of forward's own."""

    def forward(self, x):
        try:
            h = self.first(x.unsqueeze(0).expand(2, -1, -1, -1).view(-1, 999))
        except RuntimeError:
            h = self.first(x)
        return self.second(h)


@awkward(inputs=rows, sizes=((6, 1), (1, 1), (9, 1)), layers=("gate", "experts.0", "experts.1"))
class Routes(nn.Module):
    """Rows go to experts by the values of a gate."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(W, 2)
        self.experts = nn.ModuleList(nn.Linear(W, W) for _ in range(2))

    def forward(self, x):
        choice = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            index = (choice == i).nonzero().squeeze(-1)
            if index.numel():
                out.index_add_(0, index, expert(x[index]))
        return out + x


@awkward()
class SkipsRandomlyButNotHere(Base):
    """Stochastic depth, that is the identity in evaluation."""

    def forward(self, x):
        h = self.first(x)
        if self.training and torch.rand(()) < 0.5:
            return h
        return self.second(torch.relu(h))


@awkward()
class GoesThroughNumpy(Base):
    """A part is computed by numpy."""

    def forward(self, x):
        h = self.first(x)
        table = torch.from_numpy(h.detach().numpy().mean(axis=1))
        return self.second(h - table[:, None])


def ranked(batch, length):
    """Rows whose sizes differ by so much that rounding does not change their order."""
    return (torch.randn(batch, length, W) * 2.0 ** torch.arange(batch)[:, None, None],)


@awkward(inputs=ranked)
class MakesLists(Base):
    """`tolist`, a Python max and a sort."""

    def forward(self, x):
        h = self.first(x)
        order = sorted(range(h.shape[0]), key=lambda i: -float(h[i].abs().sum()))
        lengths = h.abs().sum((1, 2)).tolist()
        return self.second(h[order]) / max(lengths)


@awkward()
class ChecksTypes(Base):
    """isinstance, dtype, dim and is_contiguous of what passes."""

    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = torch.as_tensor(x)
        h = self.first(x if x.is_contiguous() else x.contiguous())
        if h.dim() == 3 and h.dtype == torch.float32 and not h.is_complex():
            h = torch.relu(h)
        return self.second(h)


@awkward()
class WithContexts(Base):
    """no_grad, autocast that is off, and enable_grad inside forward."""

    def forward(self, x):
        with torch.no_grad():
            scale = x.abs().mean()
        with torch.autocast("cpu", enabled=False):
            h = self.first(x.float())
        with torch.set_grad_enabled(torch.is_grad_enabled()):
            return self.second(torch.relu(h / scale))


@awkward()
class DecoratedForward(Base):
    """forward under `torch.no_grad()`."""

    @torch.no_grad()
    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@awkward()
class ListsOfChunks(Base):
    """A list of chunks, whose number depends on the length, joined again."""

    def forward(self, x):
        parts = [self.first(part) for part in x.split(2, dim=1)]
        return self.second(torch.cat(parts[::-1], dim=1))


@awkward()
class WritesText(Base):
    """An f-string of a shape and a dict that picks a function by name."""

    def forward(self, x):
        name = f"{'relu' if x.shape[-1] == W else 'tanh'}"
        return self.second({"relu": torch.relu, "tanh": torch.tanh}[name](self.first(x)))


@awkward()
class CondOperator(Base):
    """`torch.where` instead of a branch, and an any() in Python."""

    def forward(self, x):
        h = torch.where(x.sum() > 0, self.first(x), self.first(-x))
        if torch.isnan(h).any():
            h = torch.nan_to_num(h)
        return self.second(h)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * x.sign() * x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@awkward()
class OwnAutogradFunction(Base):
    """A custom `autograd.Function`."""

    def forward(self, x):
        return self.second(Square.apply(self.first(x)))


@awkward()
class Vmapped(Base):
    """`torch.vmap` over the batch."""

    def forward(self, x):
        return self.second(torch.vmap(self.first)(x))


@awkward(sizes=((3, 5), (2, 5), (1, 5)))
class LearnedPositions(Base):
    """A table of positions that must have the length of the input."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 5, W))

    def forward(self, x):
        return self.second(torch.relu(self.first(x + self.positions)))


class Experts(nn.ModuleDict):
    def __init__(self, count):
        super().__init__({f"expert_{i}": nn.Linear(W, W) for i in range(count)})

    def forward(self, rows, chosen):
        mixed = torch.zeros_like(rows)
        masks = F.one_hot(chosen, len(self)).permute(2, 1, 0)
        for expert in masks.sum((-1, -2)).gt(0).nonzero():
            _, taken = torch.where(masks[expert].squeeze(0))
            mixed.index_add_(0, taken, self[f"expert_{expert[0]}"](rows[taken]))
        return mixed


@awkward()
class CallsTheExpertsThatAreChosen(nn.Module):
    """A loop over the experts that some row has chosen, by the names of children."""

    def __init__(self):
        super().__init__()
        self.experts = Experts(6)

    def forward(self, x):
        rows = x.reshape(-1, W)
        chosen = rows[:, :6].topk(2).indices  # a quantized router might choose others
        return self.experts(rows, chosen).reshape(x.shape)


class CountsTheExperts(Experts):
    def forward(self, rows, chosen):
        masks = F.one_hot(chosen, len(self)).permute(2, 1, 0)
        for expert in masks.sum((-1, -2)).gt(0).nonzero(as_tuple=True)[0].tolist():
            rows = 0.9 * rows + self[f"expert_{expert}"](rows)
        return rows


@awkward()
class CallsChosenExpertsOnAllRows(CallsTheExpertsThatAreChosen):
    """An expert that is chosen changes every row: one that is not must not be called."""

    def __init__(self):
        super().__init__()
        self.experts = CountsTheExperts(6)
