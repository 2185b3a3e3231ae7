"""What quantization costs, node by node.

| file | does |
|---|---|
| `heldout.py` | which rows choose the integers, and which they are measured on |
| `rounded_layers.py`, `fitted_layers.py` | quantized layers made alone, or fitted to their inputs |
| `shipped_layers.py` | the layers that `static_quantize` would ship, one by one |
| `paired_run.py`, `measured_rows.py` | float and quantized side by side, and the table of that |
| `sensitivity.py`, `sensitivity_report.py` | which layer hurts, by three methods in one report |
| `flow.py`, `gradient.py`, `exact.py` | the three methods |
| `candidates.py`, `batching.py`, `memory_plan.py` | what the methods run, together or alone |
| `output_metric.py` | what the error of an output is |
| `allocation.py` | bits where they pay |
| `gate.py` | does a saved model or a report hold the bar |
| `quantization_info.py`, `sizes.py` | the record of a run, true bytes |
| `graph_view.py`, `graph_diff.py` | a graph for networkx, and what changed between two |
| `draw.py`, `pages.py` | pictures and pages |
"""
