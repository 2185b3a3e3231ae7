"""What each method keeps of the embedded language model, on text that calibration did not see.

    OMP_WAIT_POLICY=passive python benchmarks/accuracy.py

Plain symmetric rounding (16 levels, full range, no clip search) is the yardstick: `gap closed` is
the share of its perplexity gap to float that a method closes. `examples/minilm.py --method ...`
prints the SQNR of all-MiniLM-L6-v2's embeddings.
"""

import argparse
from pathlib import Path
from typing import Any

from timing import report

from fxquant import QuantizedLinearInt4, sqnr_db, static_quantize, trace
from fxquant.demo.language_model import calibration_tokens, heldout_tokens, load_language_model
from fxquant.demo.measure import perplexity
from fxquant.passes.decide import DecisionOptions, decide
from fxquant.passes.rewrite import rewrite

SAMPLES = 128


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    model = load_language_model()
    gm = trace(model, calibration_tokens()[:2])
    heldout = heldout_tokens()[::2]
    expected = gm(heldout[:32])
    reference = perplexity(gm, heldout)
    rows: list[dict[str, Any]] = [{"method": "float", "perplexity": reference}]
    gap = 0.0
    for symmetric in (True, False):
        name = "symmetric" if symmetric else "asymmetric"
        plain = rewrite(
            gm,
            decide(gm, DecisionOptions()),
            lambda _, linear, bits, symmetric=symmetric: QuantizedLinearInt4.from_float(
                linear, 128, symmetric
            ),
        )
        models = {"plain rounding": plain}
        for method in ("rtn", "gptq"):
            models[method], _ = static_quantize(
                gm,
                calibration_tokens()[::3].split(16),
                method=method,
                symmetric=symmetric,
                num_calibration_samples=SAMPLES,
                accuracy_warning="ignore",
            )
        for method, qmodel in models.items():
            found = perplexity(qmodel, heldout)
            gap = gap or found - reference
            rows.append(
                {
                    "method": f"{method}, {name}",
                    "perplexity": found,
                    "SQNR dB": sqnr_db(expected, qmodel(heldout[:32])),
                    "gap closed": 1 - (found - reference) / gap,
                }
            )
    report("embedded language model, INT4 group 128, held-out text", rows, arguments.json)


if __name__ == "__main__":
    main()
