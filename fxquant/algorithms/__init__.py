"""Algorithms: a weight (and statistics of its input) in, integers out."""
