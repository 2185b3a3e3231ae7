"""The command line.

| file | does |
|---|---|
| `main.py` | the commands and their options |
| `doctor.py` | what this installation can do, and what is missing |
| `sources.py` | finds models and data named on the command line |
| `output.py` | text for people or JSON for machines, and exit statuses |
"""

from fxquant.cli.main import main

__all__ = ["main"]
