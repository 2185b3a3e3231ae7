"""The passes, one verb a file, in the order of the pipeline.

Each leaves a legal graph and never changes its input.

| file | does |
|---|---|
| `calibration_data.py`, `padding.py` | batches as calls, and which tokens are padding |
| `token_noise.py` | copies of batches with tokens drawn at random |
| `check_alike.py` | that processes which share a run were given the same |
| `check_weights.py` | refuses weights that cannot be quantized, before any data runs |
| `decide.py` | which layers are quantized, and why the others are not |
| `fold_norms.py` | a BatchNorm folded into the layer before it |
| `insert_observers.py`, `calibrate.py` | observers as nodes, and data through them |
| `observe_inputs.py` | the one collector of what the input of each layer looks like |
| `scale_channels.py`, `simulate.py` | channel scales folded into the graph |
| `layer_maker.py` | a float layer as blocks of rows, and its quantized layer; tied weights |
| `rounded_layers.py`, `fitted_layers.py` | quantized layers rounded alone, or fitted to inputs |
| `fitted_widths.py` | layers fitted in several widths at once |
| `target_limits.py` | what an export format asks of them |
| `block_moments.py` | the moments of what each block of rows multiplies |
| `quantize_sequentially.py` | layers quantized in the order in which they run |
| `later_calls.py` | what layers read in the calls behind their first |
| `turns.py`, `paired_batches.py` | which layers together, and batches from turn to turn |
| `held_values.py` | what waits between turns: in memory up to a bound, else in a file |
| `float_products.py` | quantized layers that multiply in float32 meanwhile |
| `freed_memory.py` | memory that was freed, given back to the system |
| `collect_moments.py`, `opaque_layers.py` | the moments of layers at a turn |
| `rewrite.py` | quantized layers in the place of float ones, and back |
| `pack_parameters.py` | which parameters of a user's model the layers of a graph can hold |
| `quantize_activations.py` | quantize and dequantize nodes around layers |
| `quantize_products.py` | the same for products of two values, such as attention's scores |
"""
