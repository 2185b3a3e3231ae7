"""One object from one process to all: its tensors are sent as they are, the rest is pickled.

Processes of one group run one program for one user, so a pickle from one of them is trusted, as
everywhere in `torch.distributed`.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """An object, taken apart.

    Attributes:
        rest: the object's pickle without its tensors.
        tensors: these, contiguous, in the order in which the pickle refers to them.
    """

    rest: bytes
    tensors: list[Tensor]


def packed(value: object) -> Packed:
    """Take an object apart; what is no plain tensor on a CPU stays in the pickle."""
    file, tensors = io.BytesIO(), list[Tensor]()
    _Packer(file, tensors).dump(value)
    return Packed(file.getvalue(), [tensor.contiguous() for tensor in tensors])


def send(value: Packed | None, owner: int, group: dist.ProcessGroup) -> Any:
    """Give all processes a copy of the owner's object.

    Args:
        value: the object, in the owner's process; None in the others.
        owner: the rank in the group.
        group: all of them call this.
    """
    head: list[Any] = [None]
    if value is not None:
        head = [(value.rest, [(tensor.dtype, tensor.shape) for tensor in value.tensors])]
    dist.broadcast_object_list(head, group_src=owner, group=group, device=torch.device("cpu"))
    rest, kinds = head[0]
    tensors = [torch.empty(shape, dtype=dtype) for dtype, shape in kinds]
    for tensor in tensors if value is None else value.tensors:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), group_src=owner, group=group)
    return _Unpacker(io.BytesIO(rest), tensors).load() if value is None else None


class _Packer(pickle.Pickler):
    """Puts a number in the place of each tensor."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors, self._numbers = tensors, dict[int, int]()

    def persistent_id(self, obj: object) -> int | None:
        """The number of a plain tensor; None: it is pickled as usual."""
        if type(obj) is not Tensor or obj.layout is not torch.strided or obj.device.type != "cpu":
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._numbers[id(obj)]


class _Unpacker(pickle.Unpickler):
    """Puts the tensors back."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        """The tensor of a number."""
        return self.tensors[pid]
