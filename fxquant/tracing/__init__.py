"""A model in, one kind of graph out.

| file | does |
|---|---|
| `prepare.py` | a copy of the model, in eval mode, that shares the tensors |
| `replacements.py` | traceable stand-ins for torch.nn's attention and transformer layers |
| `signature.py` | which arguments of `forward` become inputs of the graph |
| `symbolic.py` | the first way: `torch.fx` with opaque children where their code cannot be traced |
| `export.py`, `guards.py` | the second way: `torch.export`, its graph brought back to plain form |
| `canonical.py` | every linear with a parameter becomes a node named after its module |
| `verify.py` | a graph counts only if it computes what the model computes |
| `trace.py` | tries the ways in order; the untraceable stays opaque, its children are traced |
| `trace_report.py` | which way was taken, what is opaque and why, how much weight is in graphs |
"""
