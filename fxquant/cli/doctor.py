"""What this installation can do: versions, the CPU, the kernel in use, and what is missing."""

import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import torch
from packaging.requirements import Requirement

from fxquant.kernels.extension import NOT_BUILT, _native
from fxquant.modules.linear_int4 import QuantizedLinearInt4
from fxquant.numerics.metrics import sqnr_db
from fxquant.report.tables import text_table

TOOLS = ("dev", "docs", "browser")  # extras for work on fxquant itself
LEAST_PRODUCT_DB = 15.0  # of a product of a random layer, whose weights are rounded to 4 bits


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis.

    Attributes:
        what: the part that was looked at.
        found: its version or state, in words.
        remedy: what to do if something is missing; empty where nothing is.
        is_fault: whether fxquant cannot work as it should until that is done.
    """

    what: str
    found: str
    remedy: str = ""
    is_fault: bool = False


def diagnose() -> list[Check]:
    """Look at the installation; each part of it gives one finding."""
    return [*_versions(), _cpu(), _kernel(), _product(), *_extras()]


def as_text(findings: list[Check]) -> str:
    """The findings as a table, and what to do below it."""
    table = text_table(("part", "found"), [(f.what, f.found) for f in findings])
    remedies = [f"{f.what}: {f.remedy}" for f in findings if f.remedy]
    if not remedies:
        return f"{table}\n\nNothing is missing."
    return "\n".join([table, "", "What to do:", *(f"  {remedy}" for remedy in remedies)])


def as_dict(findings: list[Check]) -> dict[str, Any]:
    """The findings as plain data."""
    return {"ok": not any(f.is_fault for f in findings), "findings": [asdict(f) for f in findings]}


def _versions() -> list[Check]:
    system = f"{platform.system()} {platform.machine()}"
    threads = torch.get_num_threads()
    return [
        Check("fxquant", metadata.version("fxquant")),
        Check("Python", f"{platform.python_version()} on {system}"),
        Check("torch", f"{torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"),
    ]


def _cpu() -> Check:
    return Check("CPU", f"{torch.backends.cpu.get_cpu_capability()} (as torch names it)")


def _kernel() -> Check:
    if NOT_BUILT is not None:
        return Check(
            "C++ kernel",
            f"missing: {NOT_BUILT}",
            "install a C++17 compiler and install fxquant again, or install a wheel that has the "
            "kernel. Quantized layers work without it, but they are slower.",
        )
    sets = _native.instruction_sets()
    others = f" (also built in: {', '.join(sets[1:])})" if sets[1:] else ""
    return Check("C++ kernel", f"uses {sets[0]}{others}")


def _product() -> Check:
    """Multiply with a quantized layer, and compare with the float layer."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(64, 256, generator=generator))
        x = torch.randn(8, 256, generator=generator)
        layer = QuantizedLinearInt4.from_float(linear)
        accuracy = sqnr_db(linear(x), layer(x))
    found = f"{accuracy:.1f} dB against float32, computed by the {layer.backend} backend"
    if accuracy >= LEAST_PRODUCT_DB:
        return Check("INT4 product", found)
    return Check(
        "INT4 product",
        found,
        "set FXQUANT_BACKEND=reference, and report this output as a bug.",
        is_fault=True,
    )


def _extras() -> list[Check]:
    """For each optional part of fxquant: which of its packages are installed."""
    about = metadata.metadata("fxquant")
    requirements = [Requirement(text) for text in about.get_all("Requires-Dist") or ()]
    names = [e for e in about.get_all("Provides-Extra") or () if e not in TOOLS]
    return [_extra(name, requirements) for name in names]


def _extra(extra: str, requirements: list[Requirement]) -> Check:
    needed = [
        r
        for r in requirements
        if r.marker is not None
        and r.marker.evaluate({"extra": extra})
        and not r.marker.evaluate({"extra": ""})
    ]
    missing = [r.name for r in needed if _version(r) is None]
    if missing:
        found = f"not installed: {', '.join(missing)}"
        return Check(f"extra {extra!r}", found, f"pip install 'fxquant[{extra}]', if you need it")
    return Check(f"extra {extra!r}", ", ".join(f"{r.name} {_version(r)}" for r in needed))


def _version(requirement: Requirement) -> str | None:
    """The installed version of a package, if it is one that fxquant can use."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return None
    return version if requirement.specifier.contains(version, prereleases=True) else None
