"""Modules of a quantized graph: layers with packed weights, quantization of activations.

| file | does |
|---|---|
| `weight_forms.py` | the table of weights that can be quantized, a row for each kind of layer |
| `layer.py` | what all quantized layers have in common |
| `linear.py` | what the quantized linear layers have in common |
| `linear_int4.py`, `linear_int8.py`, `linear_intn.py` | one class for each layout of a kernel |
| `saved_weight.py` | the weight of such a layer as a file holds it |
| `linear_of.py` | the class that holds a quantized matrix |
| `gated_linear.py` | a function of one linear layer times another |
| `fused_linear.py` | linear layers with what the graph computes around them |
| `embedding.py`, `embedding_bag.py` | rows that are looked up |
| `conv.py`, `grouped_linear.py` | quantized layers of other kinds |
| `conv_integers.py` | a convolution on integers, with what the graph computes around it |
| `conv_product.py` | a convolution on its packed weight, by picking patches |
| `packed_parameter.py`, `packed_tensor.py` | a bare parameter as integers, for code that reads it |
| `float_linear.py` | an `nn.Linear` around tensors that exist |
| `lazy_weight.py` | the float weight of a quantized layer, for code that reads it |
| `rounded_input.py` | a quantized layer that rounds its input with a grid known before |
| `activation.py` | activations rounded to 8 bits, with ranges known before or found on the way |
"""
