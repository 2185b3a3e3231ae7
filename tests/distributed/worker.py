"""One of two processes that share runs: `python -m tests.distributed.worker RANK FOLDER`.

FOLDER/source is a model. Each process saves what it got in every scenario as FOLDER/RANK.pt, and
together they make FOLDER/gptq and FOLDER/rtn. At the end process 1 vanishes.
"""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fxquant
from fxquant.exporters.block_calls import BlockCalls
from tests.models import WIDTH, BranchInChild, Plain, Tied

QUIET = {"group_size": 32, "skip_param_threshold": 0, "accuracy_warning": "ignore"}


class Block(nn.Module):
    """Layers of one input, a residual, a layer that runs twice, and a convolution."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 96), nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)
        self.twice = nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, 32, 3)

    def forward(self, x):
        x = x + self.down(self.gate(x).tanh() * self.up(x))
        x = x + self.twice(self.twice(x).tanh())
        return self.conv(x.transpose(1, 2))


def batches(rows=(3, 2, 3, 1, 3)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, 20, WIDTH, generator=generator) for n in rows]


def seeded(make):
    torch.manual_seed(0)
    return make().eval()


def state_of(result):
    """What must be the same to the bit, and what is said of it."""
    qmodel, info = result
    figures = info.sqnr_db, info.fitted_sqnr_db, str(info.rows)
    return {"state": dict(qmodel.state_dict()), "said": str(info.decisions), "figures": figures}


def tokens():
    return torch.arange(20).reshape(4, 5)


SHARED = {
    "gptq": lambda: fxquant.quantize(seeded(Block), batches(), method="gptq", **QUIET),
    "best of one batch": lambda: fxquant.quantize(
        seeded(Block), batches((8,)), method="best", **QUIET
    ),
    "an opaque module": lambda: fxquant.quantize(
        seeded(BranchInChild), batches(), method="gptq", **QUIET
    ),
    "ranges": lambda: fxquant.static_quantize(
        seeded(Plain), batches(), activation_bits=8, observer="movingaverage", **QUIET
    ),
    "no data, tied": lambda: fxquant.quantize(
        seeded(Tied), example_inputs=tokens(), embeddings=8, bits=8, **QUIET
    ),
}


def errors_of(report):
    """What `exact` measured."""
    return {row.module: row.output_errors for row in report.rows}


def exact():
    return errors_of(
        fxquant.sensitivity(
            seeded(Block), batches(), method="exact", rounding="rtn", group_size=32,
            skip_param_threshold=0,
        )
    )  # fmt: skip


FOLDERS = {"gptq": lambda: [{"input_ids": tokens() + i} for i in range(3)], "rtn": lambda: None}


def quantize_folder(source, target, method):
    options = {"group_size": 32, "accuracy_warning": "ignore", "method": method}
    return fxquant.quantize_checkpoint(source, target, options, FOLDERS[method]()).sqnr_db


def reading_late(finish):
    """`finish`, after the other process has had the time to go on without this one."""

    def late(*args):
        time.sleep(0.5)
        return finish(*args)

    return late


def raised(run):
    """The error that a run ends with, as text."""
    try:
        run()
    except (fxquant.FxquantError, MemoryError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def no_room(matrix):
    raise MemoryError("no more room")


def shares(rank, folder):
    """What a process gets: the results, and the errors of runs that cannot work."""
    results = {name: state_of(run()) for name, run in SHARED.items()}
    results["exact"] = exact()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # the folder must have its files until it has read them
            patch.setattr(BlockCalls, "finish", reading_late(BlockCalls.finish))
        for method in FOLDERS:
            results[f"{method} folder"] = quantize_folder(
                folder / "source", folder / method, method
            )
    own = [torch.full((4, 3, WIDTH), 1.0 + rank)]
    results["other data"] = raised(lambda: fxquant.quantize(seeded(Plain), own, **QUIET))

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:  # in a layer that it owns
            patch.setattr(torch.linalg, "cholesky_ex", no_room)
        results["one fails"] = raised(SHARED["gptq"])
    return results


def vanishes(rank):
    """Process 1 ends between two meetings."""

    def data():
        yield from batches()
        if rank == 1:
            os._exit(3)

    return raised(lambda: fxquant.quantize(seeded(Block), data(), method="gptq", **QUIET))


def main():
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=20)
    )
    results = shares(rank, folder)
    torch.save(results, folder / f"{rank}.pt")
    results["one vanishes"] = vanishes(rank)
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    main()
