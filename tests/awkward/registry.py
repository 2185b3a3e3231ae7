"""What an awkward model is: how to build it, the calls it takes, and what is expected of it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

W = 64
Arguments = tuple[Any, ...] | dict[str, Any]


def floats(batch: int, length: int) -> Arguments:
    """One tensor [batch, length, W]."""
    return (torch.randn(batch, length, W),)


def rows(batch: int, length: int) -> Arguments:
    """One tensor [batch, W]."""
    return (torch.randn(batch, W),)


def tokens(batch: int, length: int) -> Arguments:
    """Token numbers [batch, length] of a vocabulary of 50."""
    return (torch.randint(0, 50, (batch, length)),)


@dataclass(frozen=True)
class Case:
    """One awkward model.

    Attributes:
        build: makes it; the caller seeds.
        inputs: the arguments of a call for a batch size and a length.
        sizes: calls that the model takes, as (batch, length); the first is the example.
        layers: names that must have a row in the decisions; None means each `nn.Linear`.
        int4: of those, names that must be quantized; None means all of them.
        own: each quantized layer is a module of its own in the model, called as a plain Linear
            is, so that a swapped copy computes the same bits. Else what stays float is listed.
        floor: least output SQNR in dB.
        options: options of quantizing.
        blind: without example inputs the model may be refused or left float, in words.
        refused: the model is refused always, with a text that matches this.
        eval_first: call `eval()` on the model before it is passed on.
        float_only: the model has no linear layer that could be quantized.
        unsaved: what of the graph a file cannot hold, as the error says it.
        first_calls: each call is compared with the first of a new model: the state cannot be
            followed. Else a series of calls on one model is compared.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], Arguments] = floats
    sizes: tuple[tuple[int, int], ...] = ((3, 5), (1, 5), (2, 9), (4, 1))
    layers: tuple[str, ...] | None = None
    int4: tuple[str, ...] | None = None
    own: bool = True
    floor: float = 12.0
    options: dict[str, Any] = field(default_factory=dict)
    blind: bool = False
    refused: str | None = None
    eval_first: bool = False
    float_only: bool = False
    first_calls: bool = False
    unsaved: str = "nothing"

    def model(self) -> nn.Module:
        """The seeded model, as a user would pass it on."""
        torch.manual_seed(0)
        model = self.build()
        if self.eval_first:
            model.eval()
        return model

    def reference(self) -> nn.Module:
        """Another one with the same weights, for evaluation."""
        model = self.model()
        try:
            model.eval()
        except NotImplementedError:  # an exported program stays in the mode it was exported in
            return model
        return model

    def call(self, index: int = 0) -> Arguments:
        """The seeded arguments of a call: the example is number 0."""
        torch.manual_seed(1 + index)
        return self.inputs(*self.sizes[index])


CASES: dict[str, Case] = {}


def awkward(**facts: Any) -> Callable[[Any], Any]:
    """Register a class or a function that builds a model; its docstring tells what is awkward."""

    def register(build: Any) -> Any:
        assert build.__name__ not in CASES, build.__name__
        assert build.__doc__, f"{build.__name__} does not say what is awkward"
        CASES[build.__name__] = Case(build, **facts)
        return build

    return register


def run(model: nn.Module, arguments: Arguments, seed: int = 7) -> Any:
    """Call `model` on copies of `arguments`, under a seed and without gradients."""
    torch.manual_seed(seed)
    with torch.no_grad():
        if isinstance(arguments, dict):
            return model(**copied(arguments))
        return model(*copied(arguments))


def copied(value: Any) -> Any:
    """`value` with its tensors cloned: a model may write into its inputs."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)


class Two(nn.Module):
    """Two linear layers with a norm between: the plain ground that awkward habits are put on."""

    def __init__(self, linear: Callable[[int, int], nn.Module] = nn.Linear):
        super().__init__()
        self.first = linear(W, W)
        self.norm = nn.LayerNorm(W)
        self.second = nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))
