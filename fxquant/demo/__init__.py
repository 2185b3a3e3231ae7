"""The embedded model and what `fxquant demo` does with it.

| file | does |
|---|---|
| `language_model.py` | the model: bytes in, logits of the next byte out |
| `measure.py` | perplexity and tokens a second |
| `run.py` | the command: quantizes the model and prints every figure |
"""
