"""Quantized models in the formats of other runtimes, checked before and after they are written.

An export never changes a number: what a format cannot hold is a finding, found before anything is
written, and every weight is read back from the new files and compared.

| file | does |
|---|---|
| `export.py` | `export` and `check_export`: the formats by name |
| `source.py` | what there is to export: layers and float tensors by the user's names |
| `integer_layer.py` | one quantized layer as plain integers, scales and zero points |
| `findings.py` | what would be lost, and refusing it |
| `requirements.py` | what several formats ask of a layer |
| `optional.py` | libraries that are needed for one format only |
| `words.py` | integers packed into 32-bit words |
| `folder_reader.py` | the config and the tensors of a Hugging Face folder |
| `checkpoint.py`, `shards.py` | writing one: config, other files, shards and their index |
| `verify.py` | weights read back from what was written |
| `compressed_tensors.py`, `gptq.py`, `awq.py` | the formats that are Hugging Face folders |
| `load.py`, `stored_layer.py` | `load_checkpoint`: folders that were quantized elsewhere |
| `gguf_load.py`, `placing.py` | the same of a GGUF file, and layers in the place of float ones |
| `flat_module.py` | a model with tensors in a row as inputs and outputs |
| `onnx.py` | ONNX files |
| `onnx_layers.py`, `onnx_standard.py` | layers as operators of ONNX Runtime, or of the standard |
| `pt2.py` | files of torch.export |
| `gguf.py`, `gguf_file.py` | GGUF files, made of the float model's file |
| `onnx_reader.py` | weights read from an ONNX file |
| `stream.py`, `folder_writer.py` | a folder quantized shard by shard, without the model in memory |
| `meta_model.py`, `model_weights.py` | the folder's model without weights, and weights of parts |
| `stored_names.py` | what a folder calls the parameters of its model's class |
| `experts.py` | which parameters of a model without weights are matrices of experts |
| `blockwise.py` | a folder's model calibrated block by block |
| `block_list.py`, `block_record.py`, `block_calls.py` | its blocks, and what they are called with |
| `unfinished.py` | a folder on its way, which a killed run is gone on with |

Each format is an `ExportFormat`: what it would lose of a source, and writing it.
"""
