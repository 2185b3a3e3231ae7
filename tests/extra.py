"""Print what an extra of the package needs, a line each: python tests/extra.py docs"""

import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def needs(extra: str) -> list[str]:
    """The requirements of an extra."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    return list(project["optional-dependencies"][extra])


if __name__ == "__main__":
    sys.stdout.write("\n".join(needs(sys.argv[1])) + "\n")
