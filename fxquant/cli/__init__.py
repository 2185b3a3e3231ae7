"""The command line.

| file | does |
|---|---|
| `main.py` | the entry, and the commands that look at what is there |
| `quantizing.py` | the commands `quantize` and `sensitivity` |
| `exporting.py` | the command `export` |
| `options.py` | options that several commands share, and how they become a config |
| `sources.py`, `checkpoint_folder.py` | models and data that the command line names |
| `torchrun.py` | the process group, where torchrun has started the command |
| `doctor.py` | what this installation can do, and what is missing |
| `output.py` | text for people or JSON for machines, and exit statuses |
"""

from fxquant.cli.main import main

__all__ = ["main"]
