"""One pickle-free safetensors file: tensors, and a description of the graph as JSON.

| file | does |
|---|---|
| `allowlist.py` | which functions, methods and module classes a file may name, and how |
| `values.py` | arguments of nodes and constructors as JSON and back |
| `layer_table.py` | torch's modules that a file may hold; types and ranges of their arguments |
| `layers.py` | modules from a class, arguments and tensors |
| `tensor_store.py` | tensors by name; ties stay ties, layouts stay layouts |
| `schema.py` | the form of the whole description |
| `describe.py` | graphs and modules into plain data |
| `rebuild.py` | plain data into graphs and modules, trusting nothing |
| `model_layers.py` | quantized layers in a model of the user's class, described without a graph |
| `container.py` | the bytes of a safetensors file, checked as they are read |
| `files.py` | `save_model`, `load_model`, `read_description` |
"""
