"""What a run will take: memory, disk and time, predicted before it begins.

| file | does |
|---|---|
| `plan.py` | `plan`: the decisions of a run and its forecast |
| `forecast.py` | the forecast as plain values, and in words |
| `graph.py` | the forecast of `quantize` |
| `folder.py` | the forecast of `quantize_checkpoint` |
| `work.py` | layers to quantize and batches to run |
| `rehearsal.py` | a run of a model without values: what is alive, who reads what |
| `memory.py` | bytes, from layers and rehearsals |
| `seconds.py` | seconds, from layers, rehearsals and the machine's speed |
| `speed.py` | a short measurement of the machine |
"""
