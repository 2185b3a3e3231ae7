"""Plain data in; tables, files and drawings out."""
