"""What a method's name stands for: steps before rounding, how to round, steps after it."""

from dataclasses import dataclass

from fxquant.errors import OptionError, near_misses

SCALINGS = ("awq", "smoothquant")
ROUNDINGS = ("rtn", "hqq", "gptq")
SHORTHANDS = ("auto", "best")
UNSCALED = ("auto", *ROUNDINGS, "best")  # methods that leave the graph's channels as they are
NEED_DATA = (*SCALINGS, "gptq")


@dataclass(frozen=True)
class Recipe:
    """The steps of a method.

    Attributes:
        scalings: which channel scalings come first, in order; see `passes/scale_channels.py`.
        rounding: `"rtn"`, `"hqq"` or `"gptq"`.
        refined: whether integers and scales are then refined in turns.
    """

    scalings: tuple[str, ...]
    rounding: str
    refined: bool = False

    @property
    def name(self) -> str:
        """The method's name spelled out."""
        return "+".join((*self.scalings, self.rounding, *(("refine",) if self.refined else ())))


def parse_method(method: str, *, has_data: bool) -> Recipe:
    """The recipe of a method.

    Args:
        method: one of `ROUNDINGS`, any of `SCALINGS` or both joined by `+` (without a rounding,
            it is `"rtn"`); `"auto"`, which is `"gptq"` with data and `"rtn"` without; or `"best"`,
            which refines the result of `"gptq"` and without data is `"rtn"`.
        has_data: whether there is calibration data.

    Raises:
        OptionError: the method is unknown, its steps exclude each other, or it needs data.
    """
    if method == "auto":
        return Recipe((), "gptq" if has_data else "rtn")
    if method == "best":
        return Recipe((), "gptq", refined=True) if has_data else Recipe((), "rtn")
    steps = method.split("+") if isinstance(method, str) else [repr(method)]
    for step in steps:
        if step not in (*SCALINGS, *ROUNDINGS):
            names = (*ROUNDINGS, *SCALINGS, *SHORTHANDS)
            close = near_misses(step, names, count=1)
            raise OptionError(
                "method",
                found=repr(method),
                needed=f"one of {', '.join(map(repr, names))}, or some of them joined by +",
                remedy=f"Did you mean {close[0]!r}?" if close else "Use 'auto'.",
            )
        if step in NEED_DATA and not has_data:
            raise OptionError(
                "method",
                found=f"{step!r} without calibration data",
                needed="'rtn', 'hqq', 'best' or 'auto'",
                remedy="Pass data to static_quantize, or use method='rtn'.",
            )
    roundings = [step for step in steps if step in ROUNDINGS]
    scalings = tuple(step for step in steps if step in SCALINGS)
    if len(roundings) > 1 or len(set(steps)) < len(steps):
        raise OptionError(
            "method",
            found=repr(method),
            needed=f"at most one of {', '.join(ROUNDINGS)}, and no step twice",
            remedy="Leave one of them out.",
        )
    return Recipe(scalings, roundings[0] if roundings else "rtn")
