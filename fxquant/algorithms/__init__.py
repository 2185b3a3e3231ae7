"""Algorithms: a weight (and statistics of its input) in, integers out.

| file | does |
|---|---|
| `rtn.py` | rounding to nearest, with a search of the clipping range |
| `hqq.py` | half-quadratic quantization, without data |
| `gptq.py` | column by column, later columns make up for the error |
| `lazy_update.py` | the sweep over columns, in blocks, of GPTQ and of refinement |
| `target.py` | the weight to aim at, where an error has already arrived at the layer |
| `refine.py` | integers and scales in turns, behind GPTQ (the method `best`) |
| `requantize.py` | another float weight in the format of a quantized one |
"""
