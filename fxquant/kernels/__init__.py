"""Integer matrix products: one interface, several backends, a reference."""
