"""Figures: what a quantized model costs in accuracy and in bytes, and the record of a run.

| file | does |
|---|---|
| `heldout.py` | which rows choose the integers, and which they are measured on |
| `row_parts.py` | large batches in parts, so that no output is held whole |
| `paired_run.py` | the float and the quantized graph side by side on the same data |
| `chosen_experts.py` | how many tokens meet other experts than in the float model |
| `sensitivity_row.py`, `measured_rows.py` | what each layer costs, and the table of that |
| `output_metric.py` | what the error of an output is: SQNR, KL divergence or the caller's own |
| `sizes.py` | true bytes of a model |
| `quantization_info.py` | the record of a run: decisions, figures and warnings |
"""
