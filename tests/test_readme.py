"""The table of kinds of faults in `tests/README.md` names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_of_the_table_exists():
    table = (HERE / "README.md").read_text(encoding="utf-8").split("| kind | tests |")[1]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    sources = [
        file.read_text(encoding="utf-8")
        for file in (*HERE.glob("test_*.py"), *HERE.glob("*/*.py"))
        if "fuzz" not in file.parts
    ]
    defined = set(re.findall(r"^(?:def|class) (\w+)", "\n".join(sources), re.MULTILINE))
    assert len(rows) >= 40
    assert named - defined == set()
