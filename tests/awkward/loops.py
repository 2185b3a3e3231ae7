"""Python loops over sizes: recurrences, rows one by one, and rounds that are not all the same."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward, rows


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)


@awkward()
class ScansTheLength(Base):
    """A state that decays, kept of each position and joined, as in state space models."""

    def forward(self, x):
        h = self.first(x)
        state, states = torch.zeros(x.shape[0], W), []
        for t in range(x.shape[1]):
            state = torch.sigmoid(h[:, t]) * state + h[:, t]
            states.append(state)
        return self.second(torch.stack(states, dim=1)), state


@awkward()
class WritesEachPosition(Base):
    """Results are written into a tensor made before, and the last states are read after."""

    def forward(self, x):
        h = self.first(x)
        out, sums = torch.zeros_like(h), h[:, 0] * 0
        for t in range(h.size(1)):
            sums += h[:, t].abs()
            out[:, t] = h[:, t] / (sums + 1)
        return self.second(out) + sums[:, None]


@awkward()
class ReadsNeighbours(Base):
    """Numbers are computed of the number of a round; every second position is left out."""

    def forward(self, x):
        h = self.first(x)
        padded = torch.cat([h, h[:, :1]], 1)
        kept = [padded[:, t] - padded[:, t + 1] for t in range(0, x.shape[1], 2)]
        return self.second(torch.stack(kept, 1))


@awkward(sizes=((4, 5), (1, 5), (2, 9), (5, 1)))
class ListsItsRows(Base):
    """The rows as a list, which is joined again and also returned."""

    def forward(self, x):
        h = list(self.first(x))
        return {"joined": self.second(torch.cat(h, dim=0)), "rows": h}


@awkward(inputs=rows, sizes=((4, 1), (1, 1), (7, 1)))
class GoesThroughRows(Base):
    """`for row in x`, each with the sum of those before."""

    def forward(self, x):
        before, found = torch.zeros(W), []
        for row in self.first(x):
            before = 0.5 * before + row
            found.append(before.tanh())
        return self.second(torch.stack(found))


@awkward()
class TreatsARoundApart(Base):
    """The third position is another one: longer inputs than the example show it too."""

    def forward(self, x):
        h = self.first(x)
        states = [h[:, t] * (2 if t == 2 else 1) for t in range(x.shape[1])]
        return self.second(torch.stack(states, 1))


@awkward()
class LooksFarAhead(Base):
    """Something else from position 40 on, which no tried length reaches."""

    def forward(self, x):
        h = self.first(x)
        states = [h[:, t] if t < 40 else -h[:, t] for t in range(x.shape[1])]
        return self.second(torch.stack(states, 1))


@awkward()
class LeavesALoop(Base):
    """A loop that ends before the length does."""

    def forward(self, x):
        h = self.first(x)
        total = torch.zeros(x.shape[0], W)
        for t in range(x.shape[1]):
            total = total + h[:, t]
            if t == 3:
                break
        return self.second(h + total[:, None])


@awkward()
class NestsLoops(Base):
    """A loop over the length in a loop over the rows."""

    def forward(self, x):
        h = self.first(x)
        found = []
        for row in h:
            state = torch.zeros(W)
            for t in range(row.shape[0]):
                state = 0.5 * state + row[t]
            found.append(state)
        return self.second(torch.stack(found))


@awkward()
class LoopsTwice(Base):
    """Two loops over the same length, the second backwards in time, under no_grad."""

    def forward(self, x):
        h, n = self.first(x), x.shape[1]
        forth, back = [], []
        with torch.no_grad():
            state = torch.zeros(x.shape[0], W)
            for t in range(n):
                state = 0.5 * state + h[:, t]
                forth.append(state)
            state = torch.zeros(x.shape[0], W)
            for t in range(n):
                state = 0.25 * state + h[:, n - 1 - t]
                back.append(state)
        return self.second(torch.stack(forth, 1) + torch.stack(back, 1).flip(1))


@awkward()
class HasAWayForShortInputs(Base):
    """One window is treated apart, though the way for several windows would do for one, too."""

    def forward(self, x):
        h = self.first(x)
        batch, length, width = h.shape
        if length <= 8:
            windows = F.pad(h, (0, 0, 0, 8 - length))[:, None]
        else:
            windows = F.pad(h, (0, 0, 0, -length % 8)).reshape(batch, -1, 8, width)
        sums = windows.cumsum(2).reshape(batch, -1, width)
        return self.second(torch.tanh(sums[:, :length]))
