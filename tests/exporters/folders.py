"""Folders compared."""

import hashlib
from pathlib import Path


def digest(folder: Path) -> str:
    """A digest of all files below a folder, with their names."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return found.hexdigest()
