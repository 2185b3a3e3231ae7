"""One pickle-free safetensors file: tensors, and a description of the graph as JSON.

| file | does |
|---|---|
| `allowlist.py` | which functions, methods and module classes a file may name |
| `values.py` | arguments of nodes as JSON and back |
| `tensor_store.py` | tensors by name; ties stay ties, layouts stay layouts |
| `describe.py` | graphs and modules into plain data |
| `rebuild.py` | plain data into graphs and modules, trusting nothing |
| `files.py` | `save_model`, `load_model`, `read_description`; atomic writes, checked reads |
"""
