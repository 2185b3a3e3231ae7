"""What each method keeps of two real models, on text that calibration did not see.

    OMP_WAIT_POLICY=passive python benchmarks/accuracy.py
    OMP_WAIT_POLICY=passive python benchmarks/accuracy.py --model minilm --method best awq

- The embedded language model: perplexity, and the share of plain symmetric rounding's gap to float
  (16 levels, full range, no clip search) that a method closes.
- all-MiniLM-L6-v2 (the extra `minilm`): SQNR of the mean-pooled embedding. The pooler stays float.

INT4 with group size 128 unless a row says otherwise. Other libraries take part if they are
installed; see `quantizer_peers.py`.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quantizer_peers import installed_peers, missing_peers
from timing import report
from torch import nn

import fxquant
from fxquant.config.quant_config import QuantConfig
from fxquant.demo.language_model import calibration_tokens, heldout_tokens, load_language_model
from fxquant.demo.measure import perplexity
from fxquant.passes.decide import decide
from fxquant.passes.rewrite import rewrite

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
LANGUAGE_SAMPLES, SENTENCES, HELDOUT_SENTENCES = 128, 384, 256
SENSITIVITY_SAMPLES = 96
W8A8 = {"bits": 8, "activation_bits": 8}

# The options of `static_quantize` by the name of a row.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "rtn, asymmetric": {"method": "rtn", "symmetric": False},
    "hqq": {"method": "hqq"},
    "awq": {"method": "awq"},
    "smoothquant": {"method": "smoothquant"},
    "gptq": {"method": "gptq"},
    "gptq, asymmetric": {"method": "gptq", "symmetric": False},
    "awq+gptq": {"method": "awq+gptq"},
    "best": {"method": "best"},
    "best, asymmetric": {"method": "best", "symmetric": False},
    "W4A8 best, static": {"method": "best", "activation_bits": 8, "observer": "histogram"},
    "W4A8 best, dynamic": {"method": "best", "activation_bits": 8, "observer": "dynamic"},
    "W8A8 static": {"method": "rtn", "observer": "histogram", **W8A8},
    "W8A8 static, smoothquant": {"method": "smoothquant", "observer": "histogram", **W8A8},
    "W8A8 dynamic": {"method": "rtn", "observer": "dynamic", **W8A8},
}
DATA_FREE: dict[str, dict[str, Any]] = {
    "no data: rtn": {"method": "rtn"},
    "no data: rtn, asymmetric": {"method": "rtn", "symmetric": False},
    "no data: hqq, asymmetric": {"method": "hqq", "symmetric": False},
}
MIXED = "best, 4.5 bits on average"
PLAIN = "plain rounding"


@dataclass(frozen=True)
class Subject:
    """A model with its texts.

    Attributes:
        model: float.
        graph: the same, traced.
        calibration: batches.
        samples: how many rows of them are used.
        keep: names that stay float.
        measure: figures of a quantized model on held-out text, by the name of a column.
    """

    model: nn.Module
    graph: torch.fx.GraphModule
    calibration: list[Any]
    samples: int
    measure: Callable[[nn.Module], dict[str, float]]
    keep: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> list[str]:
        """Names of the layers that become INT4."""
        ledger = decide(self.graph, QuantConfig(modules_to_not_convert=self.keep))
        return [d.module for d in ledger if d.bits]


def language_model() -> Subject:
    """The embedded one."""
    model, heldout = load_language_model(), heldout_tokens()[::2]
    calibration = list(calibration_tokens()[::3].split(16))
    graph = fxquant.trace(model, calibration[0][:2])
    expected, reference = model(heldout[:32]).detach(), perplexity(graph, heldout)
    plain = reference

    @torch.no_grad()
    def measure(quantized: nn.Module) -> dict[str, float]:
        nonlocal plain
        found = perplexity(quantized, heldout)
        plain = found if plain == reference else plain  # plain rounding comes first
        closed = 1 - (found - reference) / (plain - reference)
        figure = fxquant.sqnr_db(expected, quantized(heldout[:32]))
        return {"SQNR dB": figure, "perplexity": found, "gap closed": closed}

    return Subject(model, graph, calibration, LANGUAGE_SAMPLES, measure)


def minilm() -> Subject:
    """A sentence encoder."""
    import minilm
    from transformers import AutoModel

    folder = minilm.model_folder()
    model = AutoModel.from_pretrained(folder).eval()
    calibration = minilm.batches(minilm.sentences("calibration", SENTENCES), folder)
    heldout = minilm.batches(minilm.sentences("heldout", HELDOUT_SENTENCES), folder)
    expected = minilm.embeddings(model, heldout)

    def measure(quantized: nn.Module) -> dict[str, float]:
        return {"SQNR dB": fxquant.sqnr_db(expected, minilm.embeddings(quantized, heldout))}

    graph = fxquant.trace(model, calibration[0])
    return Subject(model, graph, calibration, SENTENCES, measure, ["pooler"])


SUBJECTS = {"language model": language_model, "minilm": minilm}


def plain_rounding(subject: Subject) -> nn.Module:
    """Rounding to nearest over the full range, symmetric."""
    ledger = decide(subject.graph, QuantConfig(modules_to_not_convert=subject.keep))
    return rewrite(
        subject.graph, ledger, lambda _, linear, __: fxquant.QuantizedLinearInt4.from_float(linear)
    )


def mixed(subject: Subject) -> nn.Module:
    """`allocate`, then `best`."""
    found = fxquant.sensitivity(
        subject.model,
        subject.calibration,
        method="gradient",
        num_samples=SENSITIVITY_SAMPLES,
        modules_to_not_convert=subject.keep,
    )
    bits = fxquant.allocate(found, average_bits=4.5, choices=(4, 8))
    return static(subject, {"method": "best", "bits": bits})


def static(subject: Subject, options: dict[str, Any]) -> nn.Module:
    """`static_quantize`."""
    kept = subject.keep if isinstance(options.get("bits", 4), int) else None
    return fxquant.static_quantize(
        subject.graph,
        subject.calibration,
        num_calibration_samples=subject.samples,
        modules_to_not_convert=kept,
        accuracy_warning="ignore",
        **options,
    )[0]


def data_free(subject: Subject, options: dict[str, Any]) -> nn.Module:
    """`quantize`."""
    return fxquant.quantize(
        subject.graph,
        modules_to_not_convert=subject.keep,
        accuracy_warning="ignore",
        **options,
    )[0]


def candidates(subject: Subject) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """What makes each row, by its name; plain rounding first."""
    yield PLAIN, lambda: plain_rounding(subject)
    for name, options in DATA_FREE.items():
        yield name, lambda options=options: data_free(subject, options)
    for name, options in METHODS.items():
        yield name, lambda options=options: static(subject, options)
    yield MIXED, lambda: mixed(subject)
    for name, make in installed_peers().items():
        yield name, lambda m=make: m(subject.model, subject.quantized, subject.calibration)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", nargs="*", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--method", nargs="*", help="rows of the table; all of them by default")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    table: list[dict[str, Any]] = []
    for name in arguments.model:
        subject = SUBJECTS[name]()
        rows: list[dict[str, Any]] = []
        for method, make in candidates(subject):
            if arguments.method and method not in (PLAIN, *arguments.method):
                continue
            began = time.perf_counter()
            model = make()
            seconds = time.perf_counter() - began
            rows.append({"method": method, **subject.measure(model), "seconds": seconds})
        report(f"{name}, INT4 group 128, held-out text", rows, None)
        table += [{"model": name, **row} for row in rows]
    if missing_peers():
        print(f"\nnot installed: {', '.join(missing_peers())}")
    if arguments.json is not None:
        report("both", table, arguments.json)


if __name__ == "__main__":
    main()
