"""Plain data in; tables, files, pages and drawings out.

| file | does |
|---|---|
| `atomic.py` | a file or folder in place at once or not at all |
| `tables.py` | text tables, CSV and JSON files |
| `view.py` | how results show themselves: a line, a text, a table in notebooks, files |
| `progress.py` | bars that tell how long a step will take |
| `html.py`, `pages.py` | self-contained pages |
| `drawing.py`, `layout.py`, `folding.py` | a graph as a drawing: shapes, places, repeated blocks |
"""
