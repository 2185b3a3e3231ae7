"""Hooks, patched forwards, and classes that were changed on the instance."""

import functools
import types

import torch
import torch.nn.functional as F
from torch import nn

from tests.awkward.registry import Two, W, awkward

BOTH = {"layers": ("first", "second"), "own": False, "int4": ("second",)}


class Nested(nn.Module):
    """A block, a container and a layer."""

    def __init__(self):
        super().__init__()
        self.block = Two()
        self.stack = nn.Sequential(nn.Linear(W, W), nn.ReLU(), nn.Linear(W, W))
        self.head = nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.stack(x + self.block(x)))


class Flagged(nn.Module):
    """A child that is called with keywords."""

    def __init__(self):
        super().__init__()
        self.child, self.head = Child(), nn.Linear(W, W)

    def forward(self, x):
        return self.head(self.child(x, scale=0.5))


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(W, W)

    def forward(self, x, scale=1.0):
        return self.fc(x) * scale


def triple(module, args, output):
    return output * 3


def double_input(module, args):
    return (args[0] * 2,)


@awkward(**BOTH)
def hook_on_linear():
    """A forward hook triples what a layer returns."""
    model = Two()
    model.first.register_forward_hook(triple)
    return model


@awkward(**BOTH)
def pre_hook_on_linear():
    """A pre-hook doubles what a layer gets."""
    model = Two()
    model.first.register_forward_pre_hook(double_input)
    return model


@awkward(**BOTH)
def both_hooks_with_keywords():
    """Hooks that take keywords, on a layer."""
    model = Two()
    model.first.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True
    )
    model.first.register_forward_hook(
        lambda module, args, kwargs, output: output - args[0].mean(), with_kwargs=True
    )
    return model


@awkward(**BOTH)
def hooks_in_an_order():
    """Two hooks whose order counts, one put in front, one called always."""
    model = Two()
    model.first.register_forward_hook(triple)
    model.first.register_forward_hook(lambda module, args, output: output + 1, prepend=True)
    model.first.register_forward_hook(lambda module, args, output: output.tanh(), always_call=True)
    return model


@awkward()
def hook_on_norm():
    """A hook on a LayerNorm."""
    model = Two()
    model.norm.register_forward_hook(triple)
    return model


@awkward()
def hook_on_root():
    """A pre-hook and a hook on the model itself."""
    model = Two()
    model.register_forward_pre_hook(double_input)
    model.register_forward_hook(triple)
    return model


@awkward()
def hook_on_root_with_another_form():
    """A hook turns the model's output into a dict."""
    model = Two()
    model.register_forward_hook(lambda module, args, output: {"y": output, "x": args[0]})
    return model


@awkward(layers=("block.first", "block.second", "stack.0", "stack.2", "head"))
def hooks_on_containers():
    """Hooks on a block and on a Sequential."""
    model = Nested()
    model.stack.register_forward_hook(triple)
    model.block.register_forward_pre_hook(double_input)
    return model


@awkward()
def keyword_hook_changes_a_flag():
    """A pre-hook changes the keyword that a child is called with."""
    model = Flagged()
    model.child.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {**kwargs, "scale": 2.0}), with_kwargs=True
    )
    return model


@awkward()
def hook_that_records():
    """A hook keeps what passes in a list of the model's."""
    model = Nested()
    model.seen = []
    model.block.register_forward_hook(lambda module, args, output: model.seen.append(output))
    return model


@awkward(own=False)
def hook_that_records_a_layer():
    """A hook on a layer keeps the norm of what it returns, and changes nothing."""
    model = Two()
    model.norms = []
    model.first.register_forward_hook(
        lambda module, args, output: model.norms.append(float(output.norm()))
    )
    return model


@awkward(first_calls=True)
def hook_that_removes_itself():
    """A hook acts once."""
    model = Nested()

    def once(module, args, output):
        handle.remove()
        return output + 1

    handle = model.block.register_forward_hook(once)
    return model


@awkward(**BOTH)
def hook_that_runs_another_layer():
    """An adapter that a hook adds to a layer."""
    model = Two()
    model.adapter = nn.Linear(W, W)
    model.first.register_forward_hook(lambda module, args, output: output + model.adapter(args[0]))
    return model


@awkward(**BOTH)
def hook_that_reads_the_weight():
    """A hook that reads the weight of its layer."""
    model = Two()
    model.first.register_forward_hook(
        lambda module, args, output: output / module.weight.norm(dim=1)
    )
    return model


@awkward(own=False)
def hooks_for_gradients():
    """Backward hooks and a hook on a parameter: nothing of the forward changes."""
    model = Two()
    model.first.register_full_backward_hook(lambda module, inputs, outputs: None)
    model.second.weight.register_hook(lambda gradient: gradient * 2)
    return model


@awkward()
def hooks_for_states():
    """Hooks on loading and saving."""
    model = Two()
    model.first.register_state_dict_pre_hook(lambda *args: None)
    model.register_load_state_dict_post_hook(lambda *args: None)
    return model


@awkward()
def hook_on_a_shared_block():
    """A block with a hook that is called three times."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Two()

        def forward(self, x):
            for _ in range(3):
                x = x + self.block(x)
            return x

    model = Shared()
    model.block.register_forward_hook(lambda module, args, output: output * 0.5)
    return model


@awkward(**BOTH)
def patched_by_method_type():
    """`layer.forward = types.MethodType(...)`."""
    model = Two()

    def tripled(self, x):
        return F.linear(x, self.weight, self.bias) * 3

    model.first.forward = types.MethodType(tripled, model.first)
    return model


@awkward(**BOTH)
def patched_by_partial():
    """A partial around the old forward, as accelerate puts it on the instance."""
    model = Two()
    layer = model.first
    layer._old_forward = layer.forward

    def new_forward(module, *args, **kwargs):
        return module._old_forward(*(2 * a for a in args), **kwargs)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer.forward)
    return model


@awkward(**BOTH)
def patched_by_closure():
    """A closure over the old forward."""
    model = Two()
    old = model.first.forward
    model.first.forward = lambda x: old(x) + x
    return model


@awkward(layers=("first", "second"))
def patched_root():
    """The forward of the model itself is patched."""
    model = Two()
    old = model.forward
    model.forward = lambda x: torch.tanh(old(x * 2))
    return model


@awkward()
def patched_block():
    """The forward of a block is patched, with another signature."""
    model = Nested()

    def forward(self, x, scale=0.5):
        return self.second(torch.relu(self.first(x) * scale))

    model.block.forward = types.MethodType(forward, model.block)
    return model


@awkward()
def patched_norm():
    """The forward of a norm is patched."""
    model = Two()
    model.norm.forward = lambda x: F.layer_norm(x, (W,)) * 3
    return model


@awkward(layers=("block.first", "block.second", "stack.0", "stack.2", "head"))
def patched_container():
    """A Sequential with a forward of its own on the instance."""
    model = Nested()

    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x

    model.stack.forward = types.MethodType(forward, model.stack)
    return model


@awkward(**BOTH)
def class_changed():
    """`layer.__class__ = ...`, as quantizers and adapters do."""

    class Tripled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 3

    model = Two()
    model.first.__class__ = Tripled
    return model


@awkward()
def helper_method_patched():
    """A method that forward calls is patched on the instance."""

    class Helped(Two):
        def forward(self, x):
            return self.second(self.middle(self.first(x)))

        def middle(self, x):
            return x

    model = Helped()
    model.middle = lambda x: torch.relu(model.norm(x)) * 2
    return model


@awkward(layers=("inner.first", "inner.second"))
class DelegatesAttributes(nn.Module):
    """A wrapper whose `__getattr__` asks the wrapped model."""

    def __init__(self):
        super().__init__()
        self.inner = Two()

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


@awkward(own=False, layers=("first", "second"), int4=())
def patched_twice_and_hooked():
    """A patch, on a patch, under a hook."""
    model = Two()
    for layer in (model.first, model.second):
        old = layer.forward
        layer.forward = functools.partial(lambda f, x: f(x) * 0.5, old)
        older = layer.forward
        layer.forward = functools.partial(lambda f, x: f(x) + 1, older)
        layer.register_forward_hook(triple)
    return model
