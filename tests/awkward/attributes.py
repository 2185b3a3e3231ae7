"""Attributes that cannot be copied, and train() and eval() of a model's own."""

import copy
import logging
import threading
import weakref

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Handler(logging.Handler):
    """A handler with a lock, as all have."""

    def emit(self, record):
        """Do nothing."""


def _holding(what, make, **facts):
    """A `Base` with an attribute that is hard to copy: it works, or the attribute is named."""

    def build():
        model = Base()
        model.attribute = make(model)
        return model

    build.__name__ = f"holds_{what}"
    build.__doc__ = f"An attribute that is a {what.replace('_', ' ')}."
    awkward(**{"refused": "attribute", **facts})(build)


_holding("lock", lambda m: threading.Lock())
_holding("lock_in_a_dict", lambda m: {"a": [threading.RLock()]})
_holding("generator", lambda m: (i for i in range(3)))
_holding("torch_generator", lambda m: torch.Generator().manual_seed(1))
_holding("logger", lambda m: logging.getLogger("fxquant.tests"))
_holding("handler", lambda m: Handler())
_holding("non_leaf_tensor", lambda m: m.first.weight * 2)
_holding("list_of_non_leaf_tensors", lambda m: [m.first.weight * 2, (m.second.bias + 1,)])
_holding("weak_reference", lambda m: weakref.ref(m.first))
_holding("thread_local", lambda m: threading.local())
_holding("module", lambda m: torch)
_holding("lambda", lambda m: lambda x: m.first(x))
_holding("bound_method", lambda m: m.first.forward)
_holding("reference_to_itself", lambda m: [m])
_holding("tensor_with_a_gradient", lambda m: [torch.ones(2, requires_grad=True)])
_holding("storage", lambda m: torch.ones(2).untyped_storage())
_holding("memory_view", lambda m: memoryview(bytearray(8)))


@awkward(refused="CannotBeCopied|too large to be copied")
class CannotBeCopied(Base):
    """deepcopy raises."""

    def __deepcopy__(self, memo):
        raise RuntimeError("this model is too large to be copied")


@awkward()
class CopiesItself(Base):
    """`__deepcopy__` that forgets the training flag, and `__getstate__`."""

    def __deepcopy__(self, memo):
        other = type(self)()
        other.load_state_dict(copy.deepcopy(self.state_dict()))
        return other

    def __getstate__(self):
        return {**self.__dict__, "stamp": 1}


class _NeedsArguments(Base):
    def __init__(self, width):
        super().__init__()
        self.width = width


@awkward()
def needs_arguments():
    """`__init__` takes arguments that the model does not keep."""
    return _NeedsArguments(W)


@awkward()
class TrainReturnsNone(Base):
    """`train()` without a return value, that keeps a norm in eval mode."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(W)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()

    def forward(self, x):
        h = self.norm(self.first(x).transpose(1, 2)).transpose(1, 2)
        return self.second(torch.relu(h))


@awkward()
class EvalReturnsNone(Base):
    """`eval()` without a return value, that counts how often it was called."""

    evaluated = 0

    def eval(self):
        self.evaluated += 1
        super().eval()


@awkward()
class StaysInTraining(Base):
    """`train(False)` is refused: dropout of the model's own looks at another flag."""

    def train(self, mode=True):
        if not mode:
            self.quiet = True
        return super().train(True)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.second(h if getattr(self, "quiet", False) else F.dropout(h, 0.5))
