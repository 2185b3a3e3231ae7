"""Whether a code book of 16 values keeps more of a model than 16 integers do, at the same size.

    OMP_WAIT_POLICY=passive python benchmarks/code_books.py
    OMP_WAIT_POLICY=passive python benchmarks/code_books.py --model minilm

Each weight is rounded on its own, without data, in groups of 128 with one float scale each: to the
values of NF4 (Dettmers et al., arXiv:2305.14314), to those of FP4 (E2M1), to 16 values that are
learned for the layer (Lloyd's algorithm on its normalized weights), or to the integers -8 to 7.
`largest`: the largest weight of a group gets the largest value; `searched`: of 31 ranges down to
0.4 of that the one with the least squared error. The last row is `rtn` as fxquant ships it. The
figures are those of `accuracy.py`.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from accuracy import data_free
from subjects import SUBJECTS, Subject, subject_parser
from timing import report
from torch import Tensor, nn

from fxquant.graph.layers import sites
from fxquant.modules.layer import QuantizedLayer

GROUP, RANGES, LLOYD = 128, 31, 20
NF4 = torch.tensor([
    -1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0,
])  # fmt: skip
FP4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]) / 6
INTEGERS = torch.arange(-8.0, 8) / 8
Levels = Callable[[Tensor], Tensor]  # of normalized weights [groups, size], sorted


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The nearest of sorted levels."""
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def learned(x: Tensor) -> Tensor:
    """16 levels with little squared error on `x`."""
    levels = NF4.clone()
    for _ in range(LLOYD):
        numbers = torch.bucketize(x, (levels[1:] + levels[:-1]) / 2).flatten()
        counts = torch.bincount(numbers, minlength=len(levels))
        sums = torch.zeros(len(levels)).index_add_(0, numbers, x.flatten())
        levels = torch.where(counts > 0, sums / counts.clamp(min=1), levels).sort().values
    return levels


def rounded(weight: Tensor, levels_of: Levels, is_searched: bool) -> Tensor:
    """A weight [out, in] of which each group of inputs has a scale of its own."""
    groups = weight.detach().float().unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    levels = levels_of(groups / largest)
    best, least = torch.zeros_like(groups), torch.full_like(largest, torch.inf)
    for share in torch.linspace(1, 0.4, RANGES) if is_searched else [1.0]:
        for sign in (1, -1):  # the integers reach further to one side
            made = nearest(groups / (sign * share * largest), levels) * (sign * share * largest)
            error = (made - groups).square().sum(-1, keepdim=True)
            is_better = error < least
            best = torch.where(is_better, made, best)
            least = torch.where(is_better, error, least)
    return best.flatten(1).to(weight.dtype)


def with_rounded(
    subject: Subject, names: set[str], levels_of: Levels, is_searched: bool
) -> nn.Module:
    """The float graph with the weights of some layers rounded."""
    made: Any = copy.deepcopy(subject.graph)
    for site in list(sites(made)):
        if site.name in names:
            weight = rounded(site.module.weight, levels_of, is_searched)  # type: ignore[arg-type]
            site.module.weight = nn.Parameter(weight, requires_grad=False)
    return made  # type: ignore[no-any-return]


def rows_of(name: str, pieces: int) -> list[dict[str, Any]]:
    """The table of one model."""
    subject = SUBJECTS[name](pieces)
    books: dict[str, Levels] = {
        "NF4": lambda _: NF4, "FP4": lambda _: FP4, "learned": learned,
        "integers": lambda _: INTEGERS,
    }  # fmt: skip
    shipped: Any = data_free(subject, {"method": "rtn"})
    names = {s.name for s in sites(shipped) if isinstance(s.module, QuantizedLayer)}
    rows = []
    for book, levels_of in books.items():
        for how in ("largest", "searched"):
            model = with_rounded(subject, names, levels_of, how == "searched")
            rows.append({"values": f"{book}, {how}", **subject.row(model)})
    return [*rows, {"values": "rtn as shipped, no data", **subject.row(shipped)}]


def main() -> None:
    """Print the tables."""
    arguments = subject_parser(__doc__).parse_args()
    table: list[dict[str, Any]] = []
    for name in arguments.model:
        rows = rows_of(name, arguments.pieces)
        report(f"{name}, 16 values in groups of {GROUP}", rows, None)
        table += [{"model": name, **row} for row in rows]
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
