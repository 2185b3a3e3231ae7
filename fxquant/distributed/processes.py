"""The processes of a `torch.distributed` group that share a run.

Before anything is sent, all processes tell each other whether they are well: one that has failed
says so where the others meet it next, and all of them raise. One that is gone (killed, out of
memory) closes its connections, and one that hangs runs into the time-out of the group.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

import torch.distributed as dist

from fxquant.distributed.sending import packed, send
from fxquant.errors import OptionError, ProcessGroupError

T = TypeVar("T")


class Processes:
    """The processes that work on one run.

    All of them call the same methods in the same order.

    Args:
        group: of `torch.distributed`; its backend must take CPU tensors, as gloo does. None: this
            process is alone.

    Attributes:
        rank: the number of this process in the group.
        count: how many there are.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    def of(cls, group: "dist.ProcessGroup | None" = None) -> "Processes":
        """Those of `group`; None: of the default group, where `torch.distributed` has one.

        Raises:
            OptionError: this process is not in the group.
        """
        if not dist.is_available() or not dist.is_initialized():
            return cls()
        made = cls(dist.group.WORLD if group is None else group)
        if made.rank < 0:
            raise OptionError(
                "group",
                found="a process group that this process is not in",
                needed="one of its own groups",
                remedy="Call it in the processes of the group only.",
            )
        return made

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, what one process raises ends all; after it, all are done.

        Raises:
            ProcessGroupError: another process has failed; its error is in the text.
        """
        try:
            yield
        except ProcessGroupError:
            raise  # the others know
        except Exception as error:
            with suppress(ProcessGroupError):
                self.meet(f"{type(error).__name__}: {error}")
            raise
        self.meet()

    def check_alike(self, what: str, digest: str, remedy: str) -> None:
        """Refuse a run whose processes were given different things.

        Args:
            what: was given.
            digest: of it.
            remedy: what the caller can do.

        Raises:
            OptionError: in all processes.
        """
        for rank, other in enumerate(self.in_order([lambda: digest] * self.count)):
            if rank == 0:
                first = other
            elif other != first:
                raise OptionError(
                    what,
                    found=f"another one in process {rank} than in process 0",
                    needed="the same in all processes of the group",
                    remedy=remedy,
                )

    def broadcast(self, value: T | None, owner: int) -> T:
        """The owner's value in all processes; the others' is not looked at.

        Raises:
            ProcessGroupError: another process has failed.
        """
        own = packed(value) if self.count > 1 and self.rank == owner else None
        self.meet()
        if self.group is not None and self.count > 1:
            with _naming_group():
                sent = send(own, owner, self.group)
            value = value if self.rank == owner else sent
        return cast("T", value)

    def in_order(self, tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
        """The results of all tasks, in order and in all processes; each is done by one of them.

        They take turns, so that at most one result of each process is held.

        Raises:
            ProcessGroupError: another process has failed.
        """
        for start in range(0, len(tasks), self.count):
            turn = tasks[start : start + self.count]
            own = turn[self.rank]() if self.rank < len(turn) else None
            for owner in range(len(turn)):
                yield self.broadcast(own, owner)

    def share(self, costs: Sequence[float], tasks: Sequence[Callable[[], T]]) -> list[T]:
        """The results of all tasks, in all processes; each has an owner, balanced by cost.

        Args:
            costs: of the tasks, in any unit.
            tasks: what to do; none may depend on the result of another.

        Raises:
            ProcessGroupError: another process has failed.
        """
        owners = balanced(costs, self.count)
        own = {i: task() for i, task in enumerate(tasks) if owners[i] == self.rank}
        return [self.broadcast(own.get(i), owner) for i, owner in enumerate(owners)]

    def meet(self, failure: str | None = None) -> None:
        """Wait for the others; tell them of a failure, or that there is none, and hear of theirs.

        Args:
            failure: what has happened in this process.

        Raises:
            ProcessGroupError: another process has failed, or is gone.
        """
        if self.group is None or self.count == 1:
            return
        told: list[str | None] = [None] * self.count
        with _naming_group():
            dist.all_gather_object(told, failure, group=self.group)
        for rank, other in enumerate(told):
            if other is not None and rank != self.rank:
                raise ProcessGroupError(
                    f"process {rank} of {self.count}",
                    found=f"that it failed: {other}",
                    needed="that all processes of the group finish",
                    remedy="Mend that; no process has a result.",
                )


ALONE = Processes()


def balanced(costs: Sequence[float], count: int) -> list[int]:
    """An owner for each task: the costliest first, to whoever has least to do.

    >>> balanced([1.0, 3.0, 2.0, 2.0], 2)
    [0, 0, 1, 1]
    """
    owners, loads = [0] * len(costs), [0.0] * count
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += costs[i]
    return owners


@contextmanager
def _naming_group() -> Iterator[None]:
    """Let errors of `torch.distributed` say what they mean for the run."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessGroupError(
            "process group",
            found=f"that torch.distributed raised: {error}",
            needed="that all processes live, make the same calls and answer within its time-out",
            remedy="See what the others printed. The backend must take CPU tensors: gloo, or "
            "'cpu:gloo,cuda:nccl'. A longer run between two meetings needs a longer timeout= of "
            "init_process_group.",
        ) from error
