"""Integer matrix products: one interface, several backends, a reference; attention and norms.

| file | does |
|---|---|
| `interface.py` | what every backend of a product offers |
| `reference.py` | what every backend must compute |
| `native.py` | the backend in C++ (`csrc/`) |
| `aten.py`, `aten_int8.py` | the backends of torch's own ops |
| `choose.py` | which backend a layer uses, and why |
| `native_layout.py`, `code_fields.py` | how a weight lies in the memory that the C++ reads |
| `large_pages.py` | memory that large weights are read from faster |
| `functions.py` | activation functions that a product can apply |
| `attention.py`, `norm.py` | scaled dot product attention and norms in C++ |
| `convolution.py`, `pooling.py` | convolutions of integers and max pooling, channels last, in C++ |
| `rounding.py` | rounding weights in C++ |
| `affine.py` | rounding activations to uint8 with known scales in C++ |
| `operators.py` | registers every operator that an exported program may call |
| `registration.py` | how one is registered; `csrc/torch` does it in processes without Python |
| `extension.py` | the compiled extension, and why it may be missing |
| `eager.py` | whether a kernel may be called without torch's dispatcher |
| `gradient.py` | a gradient for ops that have none |
"""
