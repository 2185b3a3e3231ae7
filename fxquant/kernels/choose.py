"""Which backend a layer uses, and why."""

import os

import torch

from fxquant.errors import OptionError, check_choice
from fxquant.kernels.aten import AtenBackend
from fxquant.kernels.aten_int8 import AtenInt8Backend
from fxquant.kernels.interface import LinearBackend, LinearSpec
from fxquant.kernels.native import NATIVE
from fxquant.kernels.reference import REFERENCE

BACKENDS: dict[str, LinearBackend] = {
    backend.name: backend for backend in (NATIVE, AtenBackend(), AtenInt8Backend(), REFERENCE)
}
FORCE = "FXQUANT_BACKEND"  # the environment variable that forces one


def choose_backend(
    spec: LinearSpec, device: torch.device
) -> tuple[LinearBackend, dict[str, str | None]]:
    """The first backend that serves a layer, and for each backend why it does not (or None).

    Raises:
        OptionError: the environment variable FXQUANT_BACKEND names no backend that serves it.
    """
    reasons = {name: backend.unsupported(spec, device) for name, backend in BACKENDS.items()}
    forced = os.environ.get(FORCE)
    if forced is not None:
        check_choice(FORCE, forced, BACKENDS)
        if reasons[forced] is not None:
            raise OptionError(
                FORCE,
                found=f"{forced!r}, which cannot serve a layer: {reasons[forced]}",
                needed="a backend that serves every layer",
                remedy=f"Unset {FORCE}, or set it to 'reference'.",
            )
        return BACKENDS[forced], reasons
    name = next(name for name, reason in reasons.items() if reason is None)
    return BACKENDS[name], reasons


def explain_backend(spec: LinearSpec, device: torch.device) -> dict[str, str]:
    """For each backend, in order of preference, why a layer uses it or does not.

    >>> spec = LinearSpec(64, 40, group_size=20, symmetric=True)
    >>> explain_backend(spec, torch.device("cpu"))["reference"]
    'chosen'

    Raises:
        OptionError: the environment variable FXQUANT_BACKEND names no backend that serves it.
    """
    backend, reasons = choose_backend(spec, device)
    passed_over = f"{FORCE} forces {backend.name}" if FORCE in os.environ else "a faster one serves"
    texts = {name: reason or passed_over for name, reason in reasons.items()}
    return {**texts, backend.name: "chosen"}
