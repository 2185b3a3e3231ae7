"""What surrounds an export: silence, and how a forward's questions about the compiler are answered.

A forward may ask torch whether it is being compiled or exported, and then do something else than
what it does for its user. The graph has to be what it does for its user.
"""

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor

_QUESTIONS = ("is_compiling", "is_dynamo_compiling", "is_exporting")


class CompilerQuestions:
    """Answers the questions of a forward about the compiler.

    Args:
        as_in_eager_mode: answer as for the user, who runs the model without a compiler; else as
            torch would.
        are_values_known: answer, too, that no tensor is fake: whoever asks that looks at its values
            next.

    Attributes:
        were_asked: whether the forward has asked, so that the other answers may help.
    """

    def __init__(self, *, as_in_eager_mode: bool, are_values_known: bool = False) -> None:
        self.as_in_eager_mode, self.were_asked = as_in_eager_mode, False
        self.are_values_known = are_values_known

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Answer the questions of the code that runs inside."""
        kept = {name: getattr(torch.compiler, name) for name in _QUESTIONS}
        fake = torch._subclasses.FakeTensor
        for name, question in kept.items():
            setattr(torch.compiler, name, self._answer(question))
        torch._subclasses.FakeTensor = self._class_of_fakes()  # type: ignore[misc]
        try:
            yield
        finally:
            torch._subclasses.FakeTensor = fake  # type: ignore[misc]
            for name, question in kept.items():
                setattr(torch.compiler, name, question)

    def _class_of_fakes(self) -> Any:
        """Stands for the class of fake tensors where a forward looks for it."""

        def is_instance(cls: Any, value: object) -> bool:
            is_fake = isinstance(value, FakeTensor)
            if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
                return is_fake
            self.were_asked = True
            return is_fake and not self.are_values_known

        kind: Any = type("_Kind", (type(FakeTensor),), {"__instancecheck__": is_instance})
        return kind("FakeTensor", (FakeTensor,), {})

    def _answer(self, question: Any) -> Any:
        def answer() -> bool:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.startswith("torch."):  # the machinery itself needs the true answer
                return bool(question())
            self.were_asked = True
            return False if self.as_in_eager_mode else bool(question())

        return answer


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without the fast path of attention, gradients, export's warnings and log lines."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    apply = nn.Module._apply

    def apply_where_needed(module: nn.Module, function: Any, *args: Any, **kwargs: Any) -> Any:
        # `self.fc.to(x.dtype)` in a forward: torch cannot put back parameters that are fake.
        if all(function(tensor) is tensor for tensor in (*module.parameters(), *module.buffers())):
            return module
        return apply(module, function, *args, **kwargs)  # type: ignore[no-untyped-call]

    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    nn.Module._apply = apply_where_needed  # type: ignore[method-assign, assignment]
    try:
        unheard = io.StringIO()  # a failing export prints its unfinished graph
        with (
            torch.no_grad(),
            redirect_stdout(unheard),
            redirect_stderr(unheard),
            warnings.catch_warnings(action="ignore"),
        ):
            yield
    finally:
        nn.Module._apply = apply  # type: ignore[method-assign]
        logging.disable(disabled)
        torch.backends.mha.set_fastpath_enabled(fastpath)
