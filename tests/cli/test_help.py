"""The help of each command, compared as a whole with a file in `help/`.

After a change that is meant, `FXQUANT_WRITE_HELP=1 pytest tests/cli/test_help.py` writes the files
again; read them before committing.
"""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from fxquant.cli.main import cli

FOLDER = Path(__file__).parent / "help"
COMMANDS = ["fxquant", *cli.commands]


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_is_laid_out_for_reading(command):
    arguments = ["--help"] if command == "fxquant" else [command, "--help"]
    shown = CliRunner().invoke(cli, arguments, prog_name="fxquant", terminal_width=80).stdout
    file = FOLDER / f"{command}.txt"
    if os.environ.get("FXQUANT_WRITE_HELP"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(shown, encoding="utf-8")
    assert shown == file.read_text(encoding="utf-8")
    assert "\\b" not in shown


def test_no_help_is_left_of_a_command_that_is_gone():
    assert {file.stem for file in FOLDER.iterdir()} == set(COMMANDS)
