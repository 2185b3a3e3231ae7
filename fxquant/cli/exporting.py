"""The command `export`: a quantized model in the format of another runtime."""

import json
from pathlib import Path
from typing import Any

import click

from fxquant.cli.options import json_option
from fxquant.cli.output import CHECK_FAILED, Output
from fxquant.errors import OptionError
from fxquant.exporters.export import FORMATS, check_export, export
from fxquant.exporters.findings import Finding
from fxquant.report.tables import text_table


@click.command("export", short_help="Write a quantized model in another runtime's format.")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(list(FORMATS)), required=True)
@click.option(
    "--base",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="The float model: its Hugging Face folder, or its GGUF file.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="Another option of the format; may be repeated. docs/runtimes.md has them.",
)
@click.option("--check", "only_check", is_flag=True, help="Print the findings, write nothing.")
@json_option
def export_command(
    model: Path, output: Path, format_: str, base: Path | None, options: tuple[str, ...],
    only_check: bool, as_json: bool,
) -> None:  # fmt: skip
    """Write MODEL to OUTPUT in the format of another runtime.

    MODEL is a file that fxquant saved, or a folder in the format compressed-tensors, GPTQ or AWQ.

    What the format would lose is listed, and then nothing is written (status 1).
    """
    with Output(as_json).running() as out:
        chosen = _options(options)
        if base is not None:
            chosen["base"] = base
        findings = check_export(model, format_, **chosen)
        losses = [finding for finding in findings if finding.is_loss]
        if findings:
            out.text(_table(findings))
        if not losses and not only_check:
            export(model, output, format=format_, **chosen)
        written = None if losses or only_check else str(output)
        out.text(_summary(losses, written, output))
        out.result({"findings": [vars(finding) for finding in findings], "written": written})
    if losses:
        raise SystemExit(CHECK_FAILED)


def _options(texts: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE, where VALUE is JSON or a text."""
    chosen = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise OptionError(
                f"--option {text!r}",
                found="no =",
                needed="NAME=VALUE",
                remedy="Write max_shard_bytes=1000000000, for example.",
            )
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen


def _table(findings: list[Finding]) -> str:
    rows = [("refused" if f.is_loss else "advice", f.where, f.problem, f.remedy) for f in findings]
    return text_table(("", "where", "problem", "what to do"), rows)


def _summary(losses: list[Finding], written: str | None, output: Path) -> str:
    if losses:
        return f"{len(losses)} findings would change the model: nothing is written"
    return f"nothing would be lost in {output}" if written is None else f"written to {written}"
