"""Mutated files: loading raises nothing but `LoadError`, and what loads does no harm."""
