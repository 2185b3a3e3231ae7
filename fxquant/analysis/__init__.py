"""Sensitivity analysis: which layer costs how much, and what follows from it.

| file | does |
|---|---|
| `sensitivity.py`, `sensitivity_report.py` | which layer hurts, by three methods in one report |
| `flow.py`, `gradient.py`, `exact.py` | the three methods |
| `shipped_layers.py` | the layers that `static_quantize` would ship, one by one |
| `candidates.py`, `batching.py`, `memory_plan.py` | what the methods run, together or alone |
| `allocation.py` | bits where they pay |
| `knapsack.py` | the width of each layer with the least summed error |
| `saved_sizes.py` | what a layer takes in a file at each width |
| `gate.py` | whether a saved model or a report meets the thresholds |
"""
