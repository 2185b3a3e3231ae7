"""The command line.

| file | does |
|---|---|
| `main.py` | the commands and their options |
| `sources.py` | finds models and data named on the command line |
| `output.py` | text for people or JSON for machines, and exit statuses |
"""

from fxquant.cli.main import main

__all__ = ["main"]
