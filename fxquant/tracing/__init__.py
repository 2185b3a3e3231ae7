"""A model in, one graph out that was compared with the model.

| file | does |
|---|---|
| `trace.py` | tries the ways in order, and takes the first graph that does all the model does |
| `offload.py` | values of weights that accelerate brings in for each call |
| `prepare.py` | a working copy on the same memory, with weights as the model uses them |
| `replacements.py` | traceable stand-ins for torch.nn's attention and transformer layers |
| `signature.py` | which arguments of `forward` become inputs of the graph |
| `capture.py` | what every way gives: a recorded graph, or a reason in words |
| `symbolic.py` | the first way: `torch.fx`, with opaque children where that fails |
| `proxies.py` | values that are recorded instead of computed, for the first way |
| `export.py` | the second way: `torch.export`, its graph brought back to a plain one |
| `export_surroundings.py` | silence around an export, and what a forward is told of the compiler |
| `known_values.py`, `branches.py` | checks by value, in an export that knows the example's |
| `each_entry.py` | loops over the true entries of a mask (experts that were chosen), over all |
| `vmap.py` | regions under `torch.vmap`, written as the ops on batches that run |
| `loop_marks.py`, `rolling.py` | Python loops over a size: marked in an export, then one node |
| `inline.py` | opaque children of a symbolic graph, exported one by one and laid into it |
| `opaque.py` | the last way: the model's own code as one node |
| `assemble.py` | from a recorded graph to a `GraphModule` |
| `canonical.py`, `constants.py` | products with a weight become layers by name |
| `einsum.py`, `grouped.py` | products that are layers in another form: an einsum, experts |
| `bare_parameters.py` | which layers have a parameter of the user's as their whole weight |
| `oracle.py`, `variations.py` | the user's own model on the example and on other sizes |
| `other_values.py`, `value_checks.py` | other values of an example, and which branches they turn |
| `number_tensors.py`, `seeds.py` | what an export would take as fixed, or lose |
| `recurrent.py` | recurrent modules, put back from the functions of an export |
| `views.py` | views of an exported program that hold for more inputs |
| `asked_biases.py` | layers of which the model's code asks whether they have a bias |
| `results.py` | what is kept of a result, and how two differ |
| `needed.py`, `guards.py` | which sizes a graph has to refuse, and the checks that do it |
| `products.py`, `coverage.py` | which weights are factors of products, and which the graph sees |
| `product_only.py` | whether a class computes a linear layer and nothing else |
| `trace_report.py` | which way was taken, what is opaque and why, how much weight is in the graph |

Nothing here imports a pass: `trace` gives a graph, and what becomes of it is decided elsewhere.
"""
