"""What the libraries of Hugging Face have in common: folders of tensors beside a config.

Each library has a quantizer that it calls while it loads a model: first with the model on the meta
device, then with each tensor of the folder, then at the end. What is done there with fxquant's
layers is here; how each library calls it, and what it knows about dtypes, names and ties, is in
`integrations/transformers` and `integrations/diffusers`.

| file | does |
|---|---|
| `folder_config.py` | `FolderConfig`: what config.json says of the quantization |
| `loading.py` | whether layers are loaded or rounded, by the config of a folder |
| `empty_layer.py` | the place of a quantized layer while its tensors are loaded |
| `saved_layers.py` | the layers of a folder that `save_pretrained` wrote |
| `rounded_layers.py` | layers quantized while a float folder is loaded |
| `saving.py` | the tensors of a folder, and their description for its config |
"""
