"""Dtypes, wrappers, attributes that cannot be copied, and what else surrounds a model."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import Two, W, awkward


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(W, W), nn.Linear(W, W)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def of_dtype(dtype):
    return {"inputs": lambda b, n: (torch.randn(b, n, W, dtype=torch.float32).to(dtype),)}


@awkward(**of_dtype(torch.float64), refused="float64")
def double_precision():
    """A float64 model: it works, or is refused by its dtype before any work."""
    return Two().double()


@awkward(**of_dtype(torch.bfloat16))
def bfloat16():
    """A bfloat16 model."""
    return Two().bfloat16()


@awkward(**of_dtype(torch.float16))
def half_precision():
    """A float16 model."""
    return Two().half()


@awkward()
class MixedPrecision(Base):
    """A bfloat16 body between a float32 input and head."""

    def __init__(self):
        super().__init__()
        self.first.bfloat16()

    def forward(self, x):
        return self.second(torch.relu(self.first(x.bfloat16())).float())


@awkward(own=False)
class Autocasts(Base):
    """Autocast to bfloat16 inside of forward."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = self.first(x)
        return self.second(torch.relu(h.float()))


@torch.fx.wrap
def drop_path(x, p: float, training: bool):
    """Drop rows at random while training, as torchvision's stochastic depth does."""
    return x * torch.empty(x.shape[0], 1, 1).bernoulli_(1 - p) if training else x


@torch.fx.wrap
def shifted(x, shift: int, layer_weight):
    """Roll, multiply, roll back, with a branch on the length."""
    if x.shape[1] > 2:
        x = torch.roll(x, shift, 1)
    return torch.roll(F.linear(x, layer_weight), -shift, 1)


@awkward()
class WrappedFunction(Base):
    """A function marked with `torch.fx.wrap` that is the identity here."""

    def forward(self, x):
        return self.second(drop_path(torch.relu(self.first(x)), 0.1, self.training))


@awkward(own=False, int4=("second",), unsaved="the function tests.awkward")
class WrappedProduct(Base):
    """A wrapped function does the product with a layer's weight."""

    def forward(self, x):
        return self.second(torch.relu(shifted(x, 1, self.first.weight)))


def scripted(module):
    """Scripting is deprecated, and says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(module)


@awkward(layers=("1",), own=True, unsaved="RecursiveScriptModule")
def scripted_child():
    """A scripted layer before a plain one."""
    return nn.Sequential(scripted(nn.Linear(W, W)), nn.Linear(W, W))


@awkward(layers=("1",), unsaved="RecursiveScriptModule")
def script_traced_child():
    """A child that `torch.jit.trace` made."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child = torch.jit.trace(Base().eval(), torch.randn(3, 5, W))
    return nn.Sequential(child, nn.Linear(W, W))


@awkward(layers=("first", "second"), own=False)
def compiled():
    """`torch.compile(model)`, not called yet, on a backend that compiles nothing."""
    return torch.compile(Base(), backend="eager")


@awkward(layers=("0.first", "0.second", "1"), own=False)
def compiled_child():
    """A compiled child."""
    return nn.Sequential(torch.compile(Base(), backend="eager"), nn.Linear(W, W))


@awkward(layers=("first", "second"))
def compiled_in_place():
    """`model.compile()`, which leaves the class as it is."""
    model = Base()
    model.compile(backend="eager")
    return model


@awkward(layers=("first", "second"), own=False)
def data_parallel():
    """`nn.DataParallel(model)`."""
    return nn.DataParallel(Base())


@awkward()
class DisabledForCompilers(Base):
    """forward under `torch._dynamo.disable`."""

    @torch._dynamo.disable
    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@awkward()
def fx_graph():
    """A GraphModule of the user's own."""
    return torch.fx.symbolic_trace(Two())


@awkward(layers=("0.first", "0.second", "1"))
def fx_graph_as_a_child():
    """A GraphModule as a child."""
    return nn.Sequential(torch.fx.symbolic_trace(Base()), nn.Linear(W, W))


@awkward(sizes=((3, 5),), layers=("first", "second"), own=False)
def exported_program():
    """The module of an exported program."""
    program = torch.export.export(Base().eval(), (torch.randn(3, 5, W),))
    return program.module(check_guards=False)


@awkward(sizes=((3, 5), (1, 5)))
def mixed_flags():
    """Some children in training mode, some not, some frozen."""
    model = nn.Sequential(nn.Linear(W, W), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(W, W))
    model[2].eval()
    model[0].requires_grad_(False)
    return model


@awkward()
def with_gradients():
    """A model in the middle of training: gradients, and a hook on one."""
    model = Base()
    model(torch.randn(2, 3, W)).square().sum().backward()
    model.first.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    return model


@awkward()
def made_in_inference_mode():
    """Parameters that are inference tensors."""
    with torch.inference_mode():
        return Base().eval()


class Tagged(nn.Parameter):
    """A Parameter subclass with an attribute."""


@awkward()
class ParametersOfASubclass(Base):
    """Weights are of a subclass of Parameter, and carry attributes."""

    def __init__(self):
        super().__init__()
        self.first.weight = Tagged(self.first.weight.detach())
        self.first.weight.tag = {"lr": 0.1}
        self.second.weight.no_decay = True


@awkward()
class Channels(nn.Module):
    """Convolutions in channels_last memory around a layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(W, W, 1).to(memory_format=torch.channels_last)
        self.fc = nn.Linear(W, W)

    def forward(self, x):
        h = self.conv(x.unsqueeze(-1).transpose(1, 2)).squeeze(-1)
        return self.fc(h.transpose(1, 2))


@awkward()
def was_lazy():
    """A LazyLinear that a call has made a Linear."""
    model = nn.Sequential(nn.LazyLinear(W), nn.ReLU(), nn.Linear(W, W))
    model(torch.zeros(1, W))
    return model


@awkward(refused=r"(?i)lazy|uninitialized|initiali[sz]ed", sizes=((3, 5),))
def is_lazy():
    """A LazyLinear that has no weight yet."""
    return nn.Sequential(nn.LazyLinear(W), nn.ReLU(), nn.Linear(W, W))


@awkward(refused="meta", sizes=((3, 5),))
def on_meta():
    """A model without values."""
    with torch.device("meta"):
        return Base()


def nan_weight():
    """A NaN in a weight, which quantizing names (not awkward to trace)."""
    model = Base()
    model.second.weight.data[3, 4] = float("nan")
    return model


@awkward(float_only=True)
def nothing_to_quantize():
    """No layer with a weight matrix at all."""
    return nn.Sequential(nn.LayerNorm(W), nn.ReLU())


@awkward(float_only=True)
def identity():
    """No parameter at all."""
    return nn.Identity()


@awkward()
def a_sequential_of_functions():
    """Modules that are thin wrappers of functions held as attributes."""

    class Lambda(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, x):
            return self.function(x)

    return nn.Sequential(nn.Linear(W, W), Lambda(torch.relu), Lambda(lambda x: x * 2),
                         nn.Linear(W, W))  # fmt: skip


@torch.library.custom_op("fxquant_tests::softcap", mutates_args=())
def softcap(x: torch.Tensor, cap: float) -> torch.Tensor:
    """An operator of the user's own."""
    return cap * torch.tanh(x / cap)


@softcap.register_fake
def _(x: torch.Tensor, cap: float) -> torch.Tensor:
    return torch.empty_like(x)


@awkward(unsaved="the function fxquant_tests::softcap")
class OwnOperator(Base):
    """A custom operator of torch.library."""

    def forward(self, x):
        return self.second(softcap(self.first(x), 2.0))


@awkward()
class InnerClass(nn.Module):
    """Classes made inside of a function cannot be pickled; nor can a lambda as a default."""

    def __init__(self):
        super().__init__()

        class Local(nn.Module):
            def __init__(self, act=lambda x: torch.relu(x)):
                super().__init__()
                self.fc, self.act = nn.Linear(W, W), act

            def forward(self, x):
                return self.act(self.fc(x))

        self.child, self.head = Local(), nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.child(x))


@awkward(blind=True)
class AsksTheCompiler(Base):
    """Under a compiler its forward takes a way on which it fails; only export can trace it."""

    def forward(self, x):
        bias = None
        if not torch.compiler.is_compiling():
            bias = torch.ones(x.shape[0], x.shape[1], 1)
        return self.second(torch.relu(self.first(x) + bias).view(*x.shape[:-1], -1))


@awkward(blind=True)
class TellsTheCompilerSomethingElse(Base):
    """Under a compiler its forward computes other values."""

    def forward(self, x):
        factor = 1.0 if torch.compiler.is_compiling() else 2.0
        return self.second(torch.relu(factor * self.first(x)).view(*x.shape[:-1], -1))


@awkward()
class MakesTensorsOfSizes(Base):
    """Factories get sizes as separate arguments, and a limit of the input's dtype."""

    def forward(self, x):
        batch, length = x.shape[0], x.shape[1]
        hidden = torch.arange(length)[None] >= torch.full((batch, 1), length - 1)
        shift = torch.ones(batch, length, 1) + torch.zeros(batch, length, 1, dtype=x.dtype)
        scores = torch.matmul(x, x.transpose(1, 2)).masked_fill(
            hidden[:, None] & (length > 1), torch.finfo(x.dtype).min
        )
        return self.second(torch.relu(self.first(scores.softmax(-1) @ x + shift)))


@awkward()
class AddsAColumn(Base):
    """What a layer's output is added to has one column, which comes from another layer."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(W, 1)

    def forward(self, x):
        return torch.relu(self.second(torch.relu(self.first(x))) + self.gate(self.first(x)))


@awkward(options={"skip_param_threshold": 0})
class ReadsTheDtypeOfAConvolution(Base):
    """A position embedding is made in the dtype and on the device of a convolution's weight."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Conv1d(W, W, 1)

    def forward(self, x):
        weight = self.positions.weight
        places = torch.arange(x.shape[1], device=weight.device, dtype=weight.dtype)
        h = self.positions((x + places[:, None]).transpose(1, 2)).transpose(1, 2)
        return self.second(torch.relu(self.first(h)))
