"""The passes, one verb a file. Each leaves a legal graph and never changes its input."""
