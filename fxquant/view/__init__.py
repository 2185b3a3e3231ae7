"""Looking at graphs: as data for networkx, as the difference of two, as pictures and pages.

| file | does |
|---|---|
| `graph_view.py` | a graph for networkx |
| `graph_diff.py` | what changed between two graphs |
| `draw.py` | a graph as a picture or a page |
"""
