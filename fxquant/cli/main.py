"""The command line's entry, and the commands that look at what is there."""

from pathlib import Path

import click

from fxquant.analysis.gate import check_report
from fxquant.cli.doctor import as_dict, as_text, diagnose
from fxquant.cli.exporting import export_command
from fxquant.cli.options import json_option, path_option
from fxquant.cli.output import CHECK_FAILED, Output
from fxquant.cli.quantizing import plan_command, quantize_command, sensitivity_command
from fxquant.cli.sources import load_graph, load_report
from fxquant.demo.run import run_demo
from fxquant.measure.quantization_info import INFO_KEY
from fxquant.report.tables import format_db, format_shape, text_table
from fxquant.serialization.files import load_model
from fxquant.tracing.trace_report import trace_report
from fxquant.view.draw import draw
from fxquant.view.graph_diff import diff as diff_graphs

HELP = """Quantize PyTorch models to INT4 and see what it costs.

\b
Start here:
  fxquant demo
      the whole story on an embedded model
  fxquant plan mymodels:build
      what would be quantized, and why
  fxquant quantize mymodels:build --data mymodels:batches --output model.safetensors
      calibrate, quantize, measure, save
  fxquant sensitivity mymodels:build --data mymodels:batches
      which layer costs how much
  fxquant export model.safetensors FOLDER --format gptq --base FLOAT_FOLDER
      the same model for vLLM and others
  fxquant inspect model.safetensors
      what a saved file holds

Exit status: 0 done, 1 a check failed (accuracy below what was asked), 2 wrong use.

\b
Completion in a shell:
  eval "$(_FXQUANT_COMPLETE=bash_source fxquant)"     (or zsh_source, fish_source)
"""


class InOrder(click.Group):
    """Commands in the order in which a newcomer needs them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """As they were added."""
        return list(self.commands)


@click.group(
    cls=InOrder,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="fxquant")
def cli() -> None:
    """Quantize PyTorch models to INT4 and see what it costs."""


@cli.command(short_help="The whole story on an embedded model.")
@path_option("--output", "Where to save the model.")
@json_option
def demo(output: Path | None, as_json: bool) -> None:
    """Quantize the embedded language model and print what happened, in under a minute."""
    with Output(as_json).running() as out:
        out.result(run_demo(out, output))


cli.add_command(plan_command)
cli.add_command(quantize_command)
cli.add_command(sensitivity_command)
cli.add_command(export_command)


@cli.command(short_help="What a saved file holds.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--draw", "picture", type=click.Path(path_type=Path), help="A .dot, .svg or .html.")
@json_option
def inspect(file: Path, picture: Path | None, as_json: bool) -> None:
    """Print what a saved FILE holds: the decisions, the sizes, how it was traced."""
    with Output(as_json).running() as out:
        gm = load_model(file)
        record = gm.meta[INFO_KEY]
        if picture is not None:
            draw(gm, picture)
        out.text(trace_report(gm))
        if record is not None:
            headers = ("module", "type", "shape", "params", "action", "rule", "reason")
            rows = [
                (d["module"], d["kind"], format_shape(d["shape"]), d["parameters"],
                 d["action"], d["rule"], d["reason"])
                for d in record["decisions"]
            ]  # fmt: skip
            out.text(text_table(headers, rows))
            sizes = f"{record['original_size_mb']:.2f} MB -> {record['quantized_size_mb']:.2f} MB"
            out.text(f"{sizes}, output SQNR {format_db(record['sqnr_db']) or '?'} dB")
        out.result({"trace": trace_report(gm).to_dict(), "info": record})


@cli.command(short_help="What changed between two saved files.")
@click.argument("before")
@click.argument("after")
@path_option("--html", "Write a page to explore.")
@json_option
def diff(before: str, after: str, html: Path | None, as_json: bool) -> None:
    """Print what changed from BEFORE to AFTER, two saved files."""
    with Output(as_json).running() as out:
        changes = diff_graphs(load_graph(before), load_graph(after))
        if html is not None:
            changes.to_html(html)
        out.text(changes)
        out.result(changes.to_dict())


@cli.command(short_help="Compare a saved model or a report with thresholds.")
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--min-sqnr", type=float, help="The least output SQNR, in dB.")
@click.option("--max-drop", type=float, help="How far any figure may fall below the baseline, dB.")
@click.option("--baseline", type=click.Path(path_type=Path), help="An older report.")
@json_option
def check(
    report: Path, min_sqnr: float | None, max_drop: float | None, baseline: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Compare a saved model or a JSON REPORT with thresholds; status 1 if one is missed."""
    with Output(as_json).running() as out:
        failures = check_report(
            load_report(report),
            min_sqnr_db=min_sqnr,
            max_drop_db=max_drop,
            baseline=None if baseline is None else load_report(baseline),
        )
        for failure in failures:
            out.text(f"failed: {failure}")
        missed = f"{len(failures)} values below their threshold"
        out.text(missed if failures else "all thresholds met")
        out.result({"failures": [vars(failure) for failure in failures]})
    if failures:
        raise SystemExit(CHECK_FAILED)


@cli.command(short_help="Versions, CPU, kernel in use, what is missing.")
@json_option
def doctor(as_json: bool) -> None:
    """Tell the versions, the CPU, the kernel in use, and what is missing.

    Exit status: 0 all works, 1 the kernel computes wrong results on this machine.
    """
    with Output(as_json).running() as out:
        findings = diagnose()
        out.text(as_text(findings))
        out.result(as_dict(findings))
        if any(finding.is_fault for finding in findings):
            raise SystemExit(CHECK_FAILED)


def main() -> None:
    """Run the command line."""
    cli()
