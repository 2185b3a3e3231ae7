"""The embedded model and what `fxquant demo` does with it."""
