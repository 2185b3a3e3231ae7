"""Pure functions on tensors: integer types, grouping, packing, weight quantization, metrics.

| file | does |
|---|---|
| `integers.py` | integer types and the affine map to them |
| `code_books.py` | 16 levels that are not equally far apart |
| `grouping.py` | groups of a weight along its inputs |
| `packing.py` | integers of a few bits without gaps |
| `quantized_weight.py` | the one description of a quantized matrix |
| `weights.py` | weights by rounding over the full range of each group |
| `digest.py` | digests at the speed of memory |
| `metrics.py` | how far a tensor is from the float one |
"""
