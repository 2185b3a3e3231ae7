"""What the passes share: structured values, names of nodes across nested graphs, the op tables."""
