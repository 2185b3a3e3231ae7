"""Random small models, put together out of habits: the graph, the swapped copy, the fingerprint.

`FXQUANT_EXAMPLES=1000 pytest tests/test_random_models.py` looks at more of them.
"""

import functools
import os
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import fxquant
from tests.awkward.judge import call_all, check_quantized, quantize
from tests.awkward.linears import Cast, Scaled
from tests.awkward.registry import Case
from tests.awkward.weights import LoraLinear
from tests.compare import assert_same
from tests.fingerprint import unchanged

N = 32
SIZES = ((2, 4), (1, 4), (3, 6), (2, 1), (2, 4))
EXAMPLES = int(os.environ.get("FXQUANT_EXAMPLES", "40"))

# Without inputs, quantizing says that nothing was verified; graphs of odd models may warn too.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def matrix():
    return nn.Parameter(torch.randn(N, N) / 6)


class Leaf(nn.Module):
    """One habit around at most one layer; the name picks the method."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.fc = nn.Linear(N, N)
        self.count, self.memo, self.seen = 0, {}, []
        self.register_buffer("mean", torch.zeros(N))

    def forward(self, x):
        return getattr(self, self.kind)(x)

    def relu_statement(self, x):
        h = self.fc(x)
        h.relu_()
        return h

    def functional_statement(self, x):
        h = self.fc(x)
        F.hardtanh(h, inplace=True)
        return h

    def slice_assignment(self, x):
        h = self.fc(x)
        h[:, 0] = 0.5
        h[..., :4] *= 2
        return h

    def view_written(self, x):
        h = self.fc(x)
        h.transpose(1, 2)[:, 3].fill_(0.25)
        return h

    def alias_written(self, x):
        h = self.fc(x)
        same = h
        same += 1
        return torch.tanh(h)

    def input_written(self, x):
        x = x.clone() if x.is_inference() else x
        x.mul_(0.5)
        return self.fc(x)

    def keyword(self, x):
        return self.fc(input=x)

    def dropped(self, x):
        return F.dropout(self.fc(x), 0.5, self.training)

    def noisy(self, x):
        h = self.fc(x)
        return h + 0.1 * torch.randn_like(h)

    def noise_of_a_size(self, x):
        return self.fc(x + torch.rand(x.shape[0], x.size(1), 1))

    def counted(self, x):
        self.count += 1
        return self.fc(x)

    def scaled_by_the_count(self, x):
        self.count += 1
        return self.fc(x) / self.count

    def recorded(self, x):
        h = self.fc(x)
        self.seen.append(h)
        return torch.tanh(self.seen[-1])

    def remembered(self, x):
        n = x.shape[1]
        if n not in self.memo:
            self.memo[n] = torch.linspace(0, 1, n)[:, None]
        return self.fc(x) + self.memo[n]

    def averaged(self, x):
        h = self.fc(x)
        self.mean.lerp_(h.mean((0, 1)), 0.25)
        return h - self.mean

    def weight_read(self, x):
        return F.linear(torch.tanh(self.fc(x)), self.fc.weight)

    def attended(self, x):
        h = self.fc(x)
        return (h @ h.transpose(1, 2) / 6 + torch.zeros(x.shape[1], x.shape[1])).softmax(-1) @ h

    def numpy(self, x):
        h = self.fc(x)
        return h - torch.from_numpy(h.detach().numpy().mean(axis=-1, keepdims=True))

    def no_gradient(self, x):
        with torch.no_grad():
            return self.fc(x)


class Bare(nn.Module):
    """A product with a parameter of its own."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.weight, self.bias = kind, matrix(), nn.Parameter(torch.randn(N) / 6)

    def forward(self, x):
        if self.kind == "functional":
            return F.linear(x, self.weight, self.bias * 2)
        if self.kind == "transposed":
            return x @ self.weight.T
        if self.kind == "einsum":
            return torch.einsum("bnc,oc->bno", x, self.weight)
        return torch.addmm(self.bias, x.flatten(0, 1), self.weight).view(x.shape)


LINEARS = {
    "plain": nn.Linear,
    "weight_norm": lambda i, o: parametrizations.weight_norm(nn.Linear(i, o)),
    "spectral_norm": lambda i, o: parametrizations.spectral_norm(nn.Linear(i, o)),
    "lora": LoraLinear,
    "scaled": Scaled,
    "cast": Cast,
}
LEAVES = [name for name in vars(Leaf) if not name.startswith("_") and name != "forward"]
BARE = ["functional", "transposed", "einsum", "addmm"]


class Pair(NamedTuple):
    value: torch.Tensor
    other: torch.Tensor


class Around(nn.Module):
    """One habit around other modules; the name picks the method."""

    def __init__(self, kind, children):
        super().__init__()
        self.kind, self.depth = kind, len(children)
        self.plain = list(children)
        for i, child in enumerate(children):
            self.add_module(f"{kind}-{i}", child)
        self.norm, self.act = nn.LayerNorm(N), nn.ReLU(inplace=True)

    def forward(self, x):
        return getattr(self, self.kind)(x)

    def chained(self, x):
        for child in self.plain:
            x = child(x)
        return x

    def through_modules(self, x):
        for i in range(self.depth):
            x = self.act(getattr(self, f"through_modules-{i}")(x))
        return x

    def residual(self, x):
        for child in self.plain:
            x = x + child(self.norm(x))
        return x

    def residual_in_place(self, x):
        h = self.norm(x)
        for child in self.plain:
            h += child(h * 0.5)
        return h

    def shared(self, x):
        for _ in range(3):
            for child in self.plain:
                x = self.norm(x + child(x))
        return x

    def branched(self, x):
        h = self.plain[0](x)
        return h if h.sum() > 1e9 else self.norm(self.chained(h))

    def branched_on_length(self, x):
        return self.chained(x) if x.shape[1] > 4 else self.norm(x)

    def early(self, x):
        for child in self.plain:
            x = child(x)
            if float(x.detach().abs().max()) > 1e9:
                break
        return x

    def looped(self, x):
        return torch.cat([self.chained(x[:, i : i + 1]) for i in range(x.shape[1])], 1)

    def paired(self, x):
        pair = Pair(self.chained(x), x)
        return pair.value + pair[1]

    def cached(self, x):
        cache = {}
        for i, child in enumerate(self.plain):
            cache[i] = child(x)
        return sum(cache.values()) / len(cache)

    def checkpointed(self, x):
        return torch.utils.checkpoint.checkpoint(self.chained, x, use_reentrant=False)


AROUND = [name for name in vars(Around) if not name.startswith("_") and name != "forward"]


class Switched(nn.Module):
    """A child that is called with both values of a flag."""

    class Switch(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, negative=False):
            return -self.inner(x) if negative else self.inner(x)

    def __init__(self, inner):
        super().__init__()
        self.switch = self.Switch(inner)

    def forward(self, x):
        return self.switch(x) + 0.5 * self.switch(torch.tanh(x), negative=True)


def hooked(module):
    module.register_forward_hook(lambda m, args, output: output * 0.5)
    return module


def hooked_before(module):
    module.register_forward_pre_hook(lambda m, args: (args[0] + 0.5,))
    return module


def patched(module):
    old = module.forward
    module.forward = lambda x: old(x) + 1
    return module


def patched_by_partial(module):
    module.forward = functools.partial(lambda old, x: old(x) * 0.5, module.forward)
    return module


def patched_by_method(module):
    def forward(self, x):
        return torch.tanh(type(self).forward(self, x))

    module.forward = types.MethodType(forward, module)
    return module


TREATED = [hooked, hooked_before, patched, patched_by_partial, patched_by_method, Switched]
BY_NAME = {treat.__name__: treat for treat in TREATED}

leaves = st.one_of(
    st.tuples(st.just("leaf"), st.sampled_from(LEAVES)),
    st.tuples(st.just("bare"), st.sampled_from(BARE)),
    st.tuples(st.just("linear"), st.sampled_from(list(LINEARS))),
)


def grown(inner):
    """Plans around plans."""
    several = st.lists(inner, min_size=1, max_size=3)
    return st.one_of(
        st.tuples(st.just("around"), st.sampled_from(AROUND), several),
        st.tuples(st.just("treated"), st.sampled_from(list(BY_NAME)), inner),
    )


plans = st.recursive(leaves, grown, max_leaves=6)


def build(plan):
    """The module that a plan describes."""
    match plan:
        case ("leaf", kind):
            return Leaf(kind)
        case ("bare", kind):
            return Bare(kind)
        case ("linear", kind):
            return LINEARS[kind](N, N)
        case ("around", kind, inner):
            return Around(kind, [build(p) for p in inner])
        case ("treated", kind, inner):
            return BY_NAME[kind](build(inner))
    raise AssertionError(plan)


class Root(nn.Module):
    """A norm before and after keeps the sizes of numbers in hand."""

    def __init__(self, plan):
        super().__init__()
        self.before, self.body, self.after = nn.LayerNorm(N), build(plan), nn.LayerNorm(N)
        self.head = nn.Linear(N, N)

    def forward(self, x):
        return {"y": self.head(self.after(self.body(self.before(x)))), "x": x}


def case_of(plan):
    """8 bits: what is left of a difference is a fault, not rounding."""
    return Case(
        lambda: Root(plan),
        inputs=lambda batch, length: (torch.randn(batch, length, N),),
        sizes=SIZES,
        own=False,
        floor=15.0,
        options={"bits": 8, "method": "rtn"},
    )


common = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@common
@given(plan=plans, with_example=st.booleans())
@example(plan=("leaf", "relu_statement"), with_example=False)
@example(plan=("around", "branched", [("leaf", "input_written")]), with_example=True)
def test_the_graph_of_a_random_model_computes_what_it_computes(plan, with_example):
    case = case_of(plan)
    model, inputs = case.model(), case.call()
    with unchanged(model, inputs):
        gm = fxquant.trace(model, inputs) if with_example else fxquant.trace(model)
    for index, (expected, found) in call_all(case, with_example, gm):
        assert_same(found, expected, at=f"call {index}")


@common
@given(plan=plans, with_example=st.booleans())
@example(plan=("around", "shared", [("linear", "plain")]), with_example=True)
@example(plan=("around", "branched", [("linear", "lora")]), with_example=False)
@example(plan=("treated", "patched", ("linear", "spectral_norm")), with_example=True)
@example(plan=("treated", "hooked", ("linear", "plain")), with_example=False)
def test_a_random_model_is_quantized_and_swapped_as_it_is(plan, with_example):
    case = case_of(plan)
    model, data = case.model(), [case.call(), case.call()] if with_example else None
    with unchanged(model, data):
        q, info = quantize(case, model, data)
    assert all(d.reason for d in info.decisions)
    check_quantized(case, with_example, model, q)
