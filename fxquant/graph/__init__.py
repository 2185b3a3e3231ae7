"""What everybody knows of graphs and models, and no decision about them.

| file | does |
|---|---|
| `ops.py` | the one table of what ops and modules do |
| `effects.py` | which ops write into memory or draw random numbers |
| `linear_operands.py` | which ops are a linear layer, and where its operands are |
| `activation_products.py` | which products have no weight among their factors |
| `routing.py` | where experts are chosen, and by what |
| `saved_ops.py` | its column "may be in a file" |
| `batch_norms.py` | what a BatchNorm in a graph multiplies and adds |
| `calls.py` | `Call`, the arguments of one call |
| `layers.py` | the layers of a graph, their names, and putting others in their place |
| `parameters.py` | every place that uses parameters |
| `graph_module.py` | the graph module that fxquant makes, which can be pickled |
| `interpreter.py`, `stepper.py` | a graph run node by node, values freed after use |
| `structures.py`, `grouped_matmul.py`, `strided_view.py` | functions that graphs call |
| `loops.py` | `loop`: a Python loop over a size as one node |
| `shapes.py` | shapes, dtypes and module paths of nodes |
| `copying.py` | copies of module trees that share or own their tensors |
| `left_alone.py` | running a model and leaving it, and the process, as they were |
| `identity.py` | which model was it that was quantized |
| `residual.py` | where a layer's output is added to something |
| `scale_rules.py`, `channel_scaling.py` | how a scale of channels passes through a graph |
"""
