"""Pure functions on tensors: integer types, grouping, packing, weight quantization, metrics."""
