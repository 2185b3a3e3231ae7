"""Statements that write into a tensor."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward


class Base(nn.Module):
    """Two layers and a ReLU that works in place."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)
        self.act = nn.ReLU(inplace=True)


@awkward()
class MethodStatement(Base):
    """`h.relu_()` as a statement."""

    def forward(self, x):
        h = self.first(x)
        h.relu_()
        return self.second(h)


@awkward()
class FunctionStatement(Base):
    """`F.relu(h, inplace=True)` as a statement."""

    def forward(self, x):
        h = self.first(x)
        F.relu(h, inplace=True)
        return self.second(h)


@awkward()
class ModuleStatement(Base):
    """An in-place module called as a statement."""

    def forward(self, x):
        h = self.first(x)
        self.act(h)
        return self.second(h)


@awkward()
class ResidualOfActivation(Base):
    """The residual is what the in-place activation wrote."""

    def forward(self, x):
        h = self.first(x)
        return self.second(self.act(h)) + h


@awkward()
class SliceAssignment(Base):
    """`h[:, 0] = 0`."""

    def forward(self, x):
        h = self.first(x)
        h[:, 0] = 0
        return self.second(h)


@awkward()
class MaskAssignment(Base):
    """`h[h < 0] = 0.5`."""

    def forward(self, x):
        h = self.first(x)
        h[h < 0] = 0.5
        return self.second(h)


@awkward()
class SwapsHalves(Base):
    """Two slices are assigned at once from copies of each other."""

    def forward(self, x):
        h = self.first(x)
        left, right = h[..., : W // 2].clone(), h[..., W // 2 :].clone()
        h[..., : W // 2], h[..., W // 2 :] = -right, left
        return self.second(h)


@awkward(unsaved="an argument out=")
class OutArgument(Base):
    """`torch.add(..., out=h)`."""

    def forward(self, x):
        h = self.first(x)
        torch.add(h, x, out=h)
        return self.second(h)


@awkward()
class MaskedFill(Base):
    """`masked_fill_` with a mask that is computed."""

    def forward(self, x):
        h = self.first(x)
        h.masked_fill_(h > 0.5, 0.0)
        return self.second(h)


@awkward()
class OnAView(Base):
    """A slice is doubled in place: the whole is what changed."""

    def forward(self, x):
        h = self.first(x)
        part = h[..., :8]
        part.mul_(2)
        return self.second(h)


@awkward()
class OnATransposedView(Base):
    """A transposed and reshaped view is written to."""

    def forward(self, x):
        h = self.first(x)
        h.transpose(1, 2).view(h.shape[0], W, -1)[:, :4].add_(1)
        return self.second(h)


@awkward()
class OnAChunk(Base):
    """One of two chunks is written to."""

    def forward(self, x):
        h = self.first(x)
        gate, _ = h.chunk(2, dim=-1)
        gate.sigmoid_()
        return self.second(h)


@awkward()
class OnTheInput(Base):
    """The input itself is normalized in place."""

    def forward(self, x):
        x.sub_(0.5).div_(2)
        return self.second(torch.relu(self.first(x)))


@awkward()
class ResidualIntoInput(Base):
    """`x += ...` writes into the input, which is the output."""

    def forward(self, x):
        x += torch.relu(self.first(x))
        x += self.second(x)
        return x


@awkward(inputs=lambda b, n: {"batch": {"x": torch.randn(b, n, W), "more": [torch.ones(b, n, W)]}})
class IntoANestedInput(Base):
    """Tensors inside of an input that is a dict are written to, and the dict too."""

    def forward(self, batch):
        batch["x"].mul_(0.5)
        batch["h"] = self.first(batch["x"])
        batch["more"].append(batch["h"])
        return self.second(batch["h"]) + batch["more"][0] + len(batch["more"])


@awkward()
class Aliased(Base):
    """Two names for one tensor, then `+=` on one."""

    def forward(self, x):
        h = self.first(x)
        r = h
        h += 1
        h *= 2
        return self.second(r)


@awkward()
class BuiltInPieces(Base):
    """An empty output is filled in pieces."""

    def forward(self, x):
        out = torch.zeros(x.shape[0], 3, W)
        out[:, 0] = self.first(x[:, 0])
        out[:, 1].copy_(self.second(x[:, -1]))
        out[:, 2] = out[:, 0] + out[:, 1]
        return out


@awkward(own=True)
class BuiltInALoop(Base):
    """An output that is filled along the length."""

    def forward(self, x):
        out = torch.empty_like(x)
        for i in range(x.shape[1]):
            out[:, i] = self.first(x[:, i])
        return self.second(out)


@awkward()
class ScatterAndIndexAdd(Base):
    """`scatter_` and `index_add_`."""

    def forward(self, x):
        h = self.first(x)
        index = h.argmax(-1, keepdim=True)
        h.scatter_(-1, index, 0.0)
        h.index_add_(2, torch.tensor([0, 3]), x[..., :2])
        return self.second(h)


@awkward()
class AfterABranch(Base):
    """In place in a module that cannot be traced."""

    def forward(self, x):
        h = self.first(x)
        if h.mean() > -1e9:
            h.clamp_(min=0)
        h[..., 0].zero_()
        return self.second(h) + h


class Keeps(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        h = self.fc(x)
        return h, h[..., :4]


@awkward()
class OnWhatAChildReturns(nn.Module):
    """A child returns a tensor and a view of it; the parent writes to the view."""

    def __init__(self):
        super().__init__()
        self.child, self.head = Keeps(), nn.Linear(W, W)

    def forward(self, x):
        whole, part = self.child(x)
        part.fill_(1.0)
        return self.head(whole)


class WritesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        x.mul_(0.25)
        h = torch.relu(self.fc(x))
        return h if h.sum() > 1e30 else h + x


@awkward()
def opaque_children_that_write_their_input():
    """Modules with a branch that scale their input in place, between layers."""
    return nn.Sequential(nn.Linear(W, W), WritesItsInput(), nn.Linear(W, W), WritesItsInput())


@awkward()
class ReusesTheChangedInput(nn.Module):
    """A child writes into what the parent still uses."""

    def __init__(self):
        super().__init__()
        self.first, self.child, self.head = nn.Linear(W, W), WritesItsInput(), nn.Linear(W, W)

    def forward(self, x):
        h = self.first(x)
        y = self.child(h)
        return self.head(y) + h


@awkward()
class ChangesShapesInPlace(Base):
    """`unsqueeze_`, `transpose_` and `squeeze_`."""

    def forward(self, x):
        h = self.first(x)
        h.unsqueeze_(0).transpose_(1, 2).transpose_(1, 2).squeeze_(0)
        return self.second(h)


@awkward()
class DropoutAndActivationInPlace(Base):
    """A chain of in-place modules in a Sequential."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(
            nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.Hardtanh(inplace=True)
        )

    def forward(self, x):
        h = self.first(x)
        self.chain(h)
        return self.second(h) + h.sum(-1, keepdim=True)


@awkward()
class ForEach(Base):
    """`torch._foreach_mul_` writes into a list of tensors."""

    def forward(self, x):
        both = [self.first(x), self.second(x)]
        torch._foreach_mul_(both, 0.5)
        return both[0] + both[1]


@awkward()
class IntoAnExpandedCopy(Base):
    """Written before and after a clone: only one of them is read."""

    def forward(self, x):
        h = self.first(x)
        kept = h.clone()
        h.zero_()
        h += kept.relu_()
        return self.second(h) + kept


@awkward()
class DataAttribute(Base):
    """`h.data` is written to."""

    def forward(self, x):
        h = self.first(x)
        h.data[..., :4] = 0
        return self.second(h)


@awkward(inputs=lambda b, n: (torch.randint(0, 50, (b, n)),))
class OnIntegers(nn.Module):
    """Tokens are masked in place before the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, W), nn.Linear(W, W)

    def forward(self, tokens):
        tokens[tokens > 40] = 1
        tokens[:, 0] = 2
        return self.head(self.embedding(tokens))
