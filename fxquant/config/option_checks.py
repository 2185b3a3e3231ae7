"""Checks of the options that `QuantConfig` holds, one function a kind of value."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxquant.config.skip_rules import NameRule, type_rule
from fxquant.errors import OptionError, check_number
from fxquant.numerics.code_books import CODE_BITS, check_code_book
from fxquant.numerics.integers import WIDTHS
from fxquant.numerics.quantized_weight import check_symmetric

FLOAT_BITS = 16  # how a mapping of bits says "leave it float"
# A class, a function or a name of one of them.
TypeRule = type | Callable[..., Any] | str


def checked_names(argument: str, given: Sequence[str] | None) -> tuple[str, ...] | None:
    """Name rules as a tuple, or None.

    Raises:
        OptionError: it is of another kind.
    """
    if isinstance(given, str):
        raise OptionError(
            argument,
            found=f"the text {given!r}",
            needed="a list of names",
            remedy=f"Write {argument}=[{given!r}].",
        )
    if given is None:
        return None
    return tuple(NameRule(name).pattern for name in given)


def checked_types(argument: str, given: Sequence[TypeRule] | None) -> tuple[str, ...] | None:
    """Type rules as a tuple of names, or None.

    Raises:
        OptionError: it is of another kind.
    """
    if isinstance(given, str | type):
        raise OptionError(
            argument,
            found=repr(given),
            needed="a list of types",
            remedy=f"Write {argument}=[{type_rule(given)}].",
        )
    return None if given is None else tuple(type_rule(kind) for kind in given)


def check_bits(bits: int | Mapping[str, int]) -> None:
    """Refuse widths that do not exist; in a mapping, 16 means float.

    Raises:
        OptionError: it is of another kind.
    """
    is_mapping = isinstance(bits, Mapping)
    allowed = (*WIDTHS, FLOAT_BITS) if is_mapping else WIDTHS
    for name, value in bits.items() if isinstance(bits, Mapping) else [("", bits)]:
        if isinstance(value, bool | float) or value not in allowed:
            raise OptionError(
                f"bits[{name!r}]" if is_mapping else "bits",
                found=repr(value),
                needed=f"one of {', '.join(map(str, allowed))}",
                remedy="Choose one of these widths (in a mapping, 16 leaves a module float).",
            )


def check_embeddings(value: Any) -> None:
    """Refuse widths that do not exist; None means float.

    Raises:
        OptionError: it is of another kind.
    """
    if value is not None and (isinstance(value, bool | float) or value not in WIDTHS):
        raise OptionError(
            "embeddings",
            found=repr(value),
            needed=f"None, or one of {', '.join(map(str, WIDTHS))}",
            remedy="Leave it None for float embeddings.",
        )


def check_code_book_fits(
    code_book: str | None, bits: int | Mapping[str, int], embeddings: int | None, symmetric: bool
) -> None:
    """Refuse a code book that no weight can have.

    Args:
        code_book: the option, as are all that follow.
        bits: one width, or some by name.
        embeddings: the width of embeddings.
        symmetric: whether there is one zero point.

    Raises:
        OptionError: there is no such book, none of the widths is its own, or it would get zero
            points.
    """
    check_code_book(code_book)
    check_symmetric(code_book, symmetric)
    widths = bits.values() if isinstance(bits, Mapping) else [bits]
    if code_book is not None and CODE_BITS not in {*widths, embeddings}:
        raise OptionError(
            "code_book",
            found=f"{code_book!r} for weights of {', '.join(map(str, widths))} bits",
            needed=f"weights of {CODE_BITS} bits: a code book has 16 levels",
            remedy=f"Pass bits={CODE_BITS}, or leave code_book out.",
        )


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        OptionError: it is of another kind.
    """
    if not isinstance(value, bool):
        raise OptionError(
            name, found=repr(value), needed="True or False", remedy="Pass one of them."
        )


def check_not_fused(fuse: bool, result: str) -> None:
    """Refuse to fuse what is no graph.

    Args:
        fuse: the option.
        result: what the caller wants, for the text of the error.

    Raises:
        OptionError: `fuse` is True.
    """
    if fuse:
        raise OptionError(
            "fuse",
            found=f"True for {result}",
            needed="False: what is fused are the steps of a graph",
            remedy="Leave fuse out, or quantize into a graph.",
        )


def check_activation_bits(value: Any) -> None:
    """Refuse what is neither 8 nor None.

    Raises:
        OptionError: it is of another kind.
    """
    if value is not None and (isinstance(value, bool) or value != 8):
        raise OptionError(
            "activation_bits",
            found=repr(value),
            needed="8 or None",
            remedy="Leave it None for float activations.",
        )


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share.

    Args:
        name: of the option.
        value: what was given.

    Raises:
        OptionError: it is no number from 0 to 1.
    """
    check_number(name, value)
    if not 0 <= value <= 1:
        raise OptionError(
            name,
            found=repr(value),
            needed="a share from 0 to 1",
            remedy="Pass 0.5 for one half, or leave it out.",
        )


def check_parameter_threshold(value: Any) -> None:
    """Refuse what is no number of parameters; None means the default.

    Raises:
        OptionError: it is of another kind.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise OptionError(
            "skip_param_threshold",
            found=repr(value),
            needed="a whole number of at least 0",
            remedy="Pass 0 to quantize layers of every size.",
        )
