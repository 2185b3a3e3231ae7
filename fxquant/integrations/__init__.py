"""fxquant inside other libraries: each is imported by name, and registers itself there."""
