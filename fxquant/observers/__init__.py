"""Observers: modules that watch activations and return them unchanged.

| file | does |
|---|---|
| `base.py` | what all observers share |
| `minmax.py` | the extremes |
| `histogram.py`, `kl.py` | a histogram, and the clipping range that loses least of it |
| `grid.py` | from a range to the scale and zero point that span it |
| `input_statistics.py` | what a layer's input looks like, channel by channel |
| `moments.py` | second moments of a layer's input and of its error |

>>> import torch
>>> observer = create_observer("minmax")
>>> _ = observer(torch.tensor([-1.0, 0.0, 1.55]))
>>> scale, zero_point = observer.calculate_qparams()
>>> round(scale.item(), 4), int(zero_point)
(0.01, 100)
"""

import inspect
from typing import Any

from fxquant.errors import OptionError, check_choice
from fxquant.observers.base import ActivationStatistics, Observer
from fxquant.observers.histogram import AutoObserver, HistogramObserver
from fxquant.observers.minmax import MinMaxObserver, MovingAverageMinMaxObserver

OBSERVERS: dict[str, type[Observer]] = {
    "minmax": MinMaxObserver,
    "movingaverage": MovingAverageMinMaxObserver,
    "ema": MovingAverageMinMaxObserver,
    "histogram": HistogramObserver,
    "kl": HistogramObserver,
    "auto": AutoObserver,
}


def create_observer(name: str, **options: Any) -> Observer:
    """Make an observer.

    Args:
        name: `"minmax"`, `"movingaverage"` (`"ema"`), `"histogram"` (`"kl"`), or `"auto"`
            (experimental: a histogram where there are outliers, else min-max).
        **options: of the observer's class.

    Raises:
        OptionError: the name or an option is unknown.
    """
    check_choice("observer", name, OBSERVERS)
    known = list(inspect.signature(OBSERVERS[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(
            f"observer {name!r}",
            found=f"unknown options {unknown}",
            needed=f"options among {known}" if known else "no options",
            remedy="Correct the spelling or leave the option out.",
        )
    return OBSERVERS[name](**options)


__all__ = [
    "ActivationStatistics",
    "AutoObserver",
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "Observer",
    "create_observer",
]
