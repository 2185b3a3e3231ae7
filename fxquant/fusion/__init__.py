"""Fusion: operations of a quantized graph that run as one.

| file | does |
|---|---|
| `fuse.py` | `fuse`: every pattern on a copy of a graph |
| `patterns.py` | the table of patterns |
| `attention.py` | scaled dot product attention, with heads that share keys |
| `shared_inputs.py` | linear layers that read one value |
| `gates.py` | a function of one layer times another |
| `functions.py` | a function behind a linear layer |
| `convolutions.py` | convolutions of integers, with what stands around them |
| `pooling.py` | max pooling behind these |
| `norms.py` | norms, with the addition before them |
| `layers.py` | the layers that a graph calls, layers made of several, and places for them |
| `matching.py` | whether a node computes a formula |
| `strides.py` | whether a value may lie in memory in another way |
| `modules.py` | `fuse_modules`: parts of a model of the user's class |
| `fused.py` | what of a graph was fused |
"""
