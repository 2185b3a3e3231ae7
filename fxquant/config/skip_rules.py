"""Rules that keep nodes in float: by type, by name, by parameter count."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.errors import OptionError, RuleError, near_misses

aten = torch.ops.aten


@dataclass(frozen=True)
class SkipRules:
    """What stays in float.

    Attributes:
        skip_types: module classes or function targets.
        skip_names: exact names, parents' names, globs, or `re:` and a regular expression.
        skip_param_threshold: nodes with fewer parameters than this.
    """

    skip_types: tuple[Any, ...]
    skip_names: tuple[str, ...]
    skip_param_threshold: int

    def __getitem__(self, name: str) -> Any:
        """The entry called `name`: callers read the default as a mapping, too."""
        if name not in {f.name for f in fields(self)}:
            raise KeyError(name)
        return getattr(self, name)


# What `layer_types` may name: classes whose weight has a `LayerForm`.
QUANTIZABLE_TYPES: tuple[Any, ...] = (
    nn.Linear, nn.Embedding, nn.EmbeddingBag, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, "GroupedLinear",
)  # fmt: skip

DEFAULT_INT4_SKIP = SkipRules(
    skip_types=(
        nn.Embedding,
        nn.EmbeddingBag,
        nn.LayerNorm,
        nn.RMSNorm,
        nn.GroupNorm,
        nn.modules.batchnorm._NormBase,
        F.embedding,
        F.layer_norm,
        aten.embedding.default,
        aten.layer_norm.default,
        aten.rms_norm.default,
    ),
    skip_names=("lm_head",),
    skip_param_threshold=1024,
)


@dataclass(frozen=True)
class NameRule:
    """A pattern over qualified names.

    >>> NameRule("encoder.0").is_match("encoder.0.fc"), NameRule("encoder.0").is_match("encoder.01")
    (True, False)
    >>> NameRule("*.attn.*").is_match("layers.3.attn.q"), NameRule("re:q$").is_match("attn.q")
    (True, True)
    """

    pattern: str

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str) or not self.pattern:
            raise OptionError(
                "name rule",
                found=repr(self.pattern),
                needed="a name, a parent's name, a glob or 're:' and a regular expression",
                remedy="Write the rule as text, for example 'encoder.layer.0' or '*.attn.*'.",
            )
        if self.pattern.startswith("re:"):
            try:
                re.compile(self.pattern[3:])
            except re.error as error:
                raise OptionError(
                    f"name rule {self.pattern!r}",
                    found=f"a regular expression that does not compile: {error}",
                    needed="a valid regular expression after 're:'",
                    remedy="Correct it, or leave out 're:' to match a plain name.",
                ) from error

    def is_match(self, name: str) -> bool:
        """Whether the rule selects the node called `name`."""
        if self.pattern.startswith("re:"):
            return re.search(self.pattern[3:], name) is not None
        if any(character in self.pattern for character in "*?["):
            return fnmatch.fnmatchcase(name, self.pattern)
        return name == self.pattern or name.startswith(self.pattern + ".")


def check_names_match(argument: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raise a `RuleError` with near misses if a pattern selects none of `names`."""
    for pattern in patterns:
        rule = NameRule(pattern)
        if any(rule.is_match(name) for name in names):
            continue
        close = near_misses(pattern.removeprefix("re:").strip("*."), _with_parents(names))
        raise RuleError(
            f"{argument}: rule {pattern!r}",
            found="no node with parameters that it selects",
            needed="a rule that selects at least one",
            remedy=f"Near misses: {', '.join(close)}."
            if close
            else f"Some names of this model: {', '.join(map(repr, names[:5]))}.",
        )


def check_types_match(argument: str, types: Iterable[Any], present: Sequence[Any]) -> None:
    """Raise a `RuleError` if a type selects no node; `present` are module classes and functions."""
    for kind in types:
        if any(is_type_match(kind, other) for other in present):
            continue
        names = sorted({type_name(other) for other in present})
        raise RuleError(
            f"{argument}: type {type_name(kind)}",
            found="no node of that type with parameters",
            needed="a type that the model has",
            remedy=f"Near misses: {', '.join(near_misses(type_name(kind), names) or names)}.",
        )


def is_type_match(rule: Any, kind: Any) -> bool:
    """Whether a rule (a class, a function, or the name of one) selects a node of `kind`.

    A class selects its subclasses, too, also by name.
    """
    if isinstance(rule, str):
        classes = kind.__mro__ if isinstance(kind, type) else (kind,)
        return any(rule in (type_name(cls), type_rule(cls)) for cls in classes)
    if isinstance(rule, type) and isinstance(kind, type):
        return issubclass(kind, rule)
    return rule is kind or rule == kind


def type_name(kind: Any) -> str:
    """How tables name a module class or a function."""
    if isinstance(kind, torch._ops.OpOverload):
        return str(kind)
    if isinstance(kind, str):
        return kind.rpartition(":")[2]
    return str(getattr(kind, "__name__", kind))


def type_rule(kind: Any) -> str:
    """A rule over types as text, which names one class or function only.

    >>> type_rule(nn.Linear), type_rule("Linear"), type_rule(aten.embedding.default)
    ('torch.nn.modules.linear:Linear', 'Linear', 'aten.embedding.default')
    """
    if isinstance(kind, str):
        return kind
    if isinstance(kind, torch._ops.OpOverload) or not hasattr(kind, "__qualname__"):
        return type_name(kind)
    return f"{kind.__module__}:{kind.__qualname__}"


def _with_parents(names: Sequence[str]) -> list[str]:
    parents = {".".join(parts[:n]) for parts in (x.split(".") for x in names) for n in range(1, 9)}
    return sorted({*names, *parents})
