"""Modules of a quantized graph: Linear layers with packed weights, activation quantization."""
