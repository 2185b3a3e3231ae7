"""One process of the fuzz: it takes numbers of cases, and says what each file did.

    python -m tests.fuzz.worker FOLDER FIRST COUNT

Case n is always the same file. Each line that is printed is a finished case; so where the process
dies, the case after the last line is the one that killed it.
"""

import contextlib
import io
import random
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import fxquant
from fxquant.errors import FxquantError, LoadError
from fxquant.serialization.files import load_model, read_description
from tests.fuzz.bases import Base, bases
from tests.fuzz.mutations import Content, mutated

MEMORY = 12 << 30  # bytes a process may map: what a graph allocates when it runs is not promised


def contents(folder: Path, made: list[Base]) -> list[Content]:
    """The description and tensors of each honest file."""
    found = []
    for base in made:
        path = folder / f"{base.name}.safetensors"
        fxquant.save_model(base.graph, path)
        found.append((read_description(path), load_file(path)))
    return found


def attempt(what: str, call: Callable[[], Any]) -> str | None:
    """What is wrong with the exception that `call` raises, or None."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            call()
    except FxquantError:
        return None
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        return f"{what}: {lines[-1][:200]} | " + " | ".join(line.strip() for line in lines[-8:-1])
    return None


def judge(data: bytes, base: Base, path: Path) -> str:
    """`refused`, `loaded`, or what is wrong."""
    path.write_bytes(data)
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        gm = load_model(path)
    except LoadError:
        return "refused"
    except Exception:
        lines = traceback.format_exc().strip().splitlines()
        return f"WRONG load: {lines[-1][:200]} | " + " | ".join(
            line.strip() for line in lines[-8:-1]
        )
    saved = path.with_suffix(".again")
    faults = [
        None if torch.equal(torch.get_rng_state(), random_state) else "load: draws",
        attempt("run", lambda: _run(gm, base)),
        None if torch.is_grad_enabled() and torch.get_num_threads() == threads else "run: modes",
        attempt("networkx", lambda: fxquant.to_networkx(gm)),
        attempt("dequantize", lambda: fxquant.dequantize_model(gm)),
        attempt("swap", lambda: fxquant.swap_modules(base.model, gm)),
        attempt("save", lambda: fxquant.save_model(gm, saved)),
    ]
    wrong = [fault for fault in faults if fault is not None]
    return "WRONG " + " || ".join(wrong) if wrong else "loaded"


def _run(gm: Any, base: Base) -> None:
    with torch.no_grad():
        gm(*(a.clone() if isinstance(a, torch.Tensor) else a for a in base.arguments))


def main(folder: Path, first: int, count: int) -> None:
    """Judge the cases from `first` on."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made = bases()
    found = contents(folder, made)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    path = folder / f"case-{first}.safetensors"
    for number in range(first, first + count):
        rng = random.Random(number)
        index = rng.randrange(len(made))
        torch.manual_seed(number)
        try:
            data = mutated(found[index], rng)
        except (TypeError, ValueError, KeyError, RecursionError, AttributeError):
            data = b""  # a change of a change that has no meaning
        result = judge(data, made[index], path)
        sys.stdout.write(f"{number} {result}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
