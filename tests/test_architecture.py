"""The table of rooms in docs/architecture.md is held: the imports must follow it."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fxquant"
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \|", re.MULTILINE)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@cache
def layers() -> dict[str, int]:
    table = {}
    for number, rooms in ROW.findall((ROOT / "docs" / "architecture.md").read_text()):
        for room in re.findall(r"`(\w+)(?:\.py|/)`", rooms):
            table[room] = int(number)
    return table


def imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(parsed(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [node.module or ""]
            if node.module == "fxquant":
                names = [f"fxquant.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("fxquant.")}
    return rooms


SOURCES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_or_a_lower_layer(path):
    table = layers()
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert room in table, f"{room} has no row in the table of docs/architecture.md"
    above = {r for r in imported_rooms(path) if table[r] > table[room]}
    assert not above, f"{path.relative_to(ROOT)} imports from above: {sorted(above)}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_hides_inside_a_function(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hidden = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
            assert not hidden, f"{path}:{hidden[0].lineno}"


def test_no_class_name_stands_for_two_things():
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_no_constant_has_two_values():
    """Each is named for what it is, so that two files never mean two things by one word."""
    values: dict[str, dict[str, list[str]]] = {}
    for path in SOURCES:
        for node in parsed(path).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.AnnAssign) and node.value is not None:
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id.isupper() and target.id[0] != "_":
                    where = f"{path.relative_to(ROOT)}:{node.lineno}"
                    value = ast.unparse(node.value)
                    values.setdefault(target.id, {}).setdefault(value, []).append(where)
    for name in ("FAULT",):  # of the kernels, which share an interface
        values.pop(name)
    assert not {name: places for name, places in values.items() if len(places) > 1}


ROOMS = [p for p in sorted(PACKAGE.glob("*/__init__.py")) if len(list(p.parent.glob("*.py"))) > 2]


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.parent.name)
def test_the_table_of_a_room_names_each_of_its_files_once(path):
    named = re.findall(r"`(\w+\.py)`", path.read_text())
    assert sorted(named) == sorted(p.name for p in path.parent.glob("*.py") if p != path)
