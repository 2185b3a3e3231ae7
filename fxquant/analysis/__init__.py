"""What quantization costs, node by node."""
