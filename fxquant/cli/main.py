"""The commands and their options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fxquant.analysis.gate import check_report
from fxquant.analysis.sensitivity import METHODS as SENSITIVITY_METHODS
from fxquant.analysis.sensitivity import sensitivity
from fxquant.analysis.shipped_layers import ROUNDINGS
from fxquant.cli.doctor import as_dict, as_text, diagnose
from fxquant.cli.output import CHECK_FAILED, Output, exit_statuses
from fxquant.cli.sources import load_data, load_graph, load_report, load_source
from fxquant.demo.run import run_demo
from fxquant.errors import OptionError
from fxquant.graph.calls import Call
from fxquant.measure.quantization_info import INFO_KEY
from fxquant.passes.calibration_data import as_call
from fxquant.pipeline import plan, quantize, static_quantize
from fxquant.report.tables import format_db, format_shape, text_table
from fxquant.serialization.files import load_model, save_model
from fxquant.tracing.trace_report import trace_report
from fxquant.view.draw import draw
from fxquant.view.graph_diff import diff as diff_graphs

MODEL_HELP = """
MODEL is package.module:function, a function without arguments that returns the model, or a
.safetensors file that fxquant saved."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
data_option = click.option(
    "--data",
    metavar="PACKAGE.MODULE:FUNCTION",
    help="A function that returns calibration batches: tensors, tuples or dicts of arguments.",
)
bits_option = click.option("--bits", type=click.Choice(["4", "8"]), default="4", show_default=True)
group_option = click.option("--group-size", type=int, default=128, show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fxquant")
def cli() -> None:
    r"""Quantize PyTorch models to INT4 and see what it costs.

    \b
    Start here:
      fxquant demo                                     the whole story on an embedded model
      fxquant quantize mymodels:build --dry-run        what would be quantized, and why
      fxquant quantize mymodels:build --data mymodels:batches --output model.safetensors
      fxquant sensitivity mymodels:build --data mymodels:batches
      fxquant inspect model.safetensors

    Exit status: 0 done, 1 a check failed (accuracy below what was asked), 2 wrong use.
    """


@cli.command()
@click.option("--output", type=click.Path(path_type=Path), help="Where to save the model.")
@json_option
def demo(output: Path | None, as_json: bool) -> None:
    """Quantize the embedded language model and print what happened, in under a minute."""
    out = Output(as_json)
    with exit_statuses():
        out.result(run_demo(out, output))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Tell the versions, the CPU, the kernel in use, and what is missing.

    Exit status: 0 all works, 1 the kernel computes wrong results on this machine.
    """
    out = Output(as_json)
    findings = diagnose()
    out.text(as_text(findings))
    out.result(as_dict(findings))
    if any(finding.is_fault for finding in findings):
        raise SystemExit(CHECK_FAILED)


def rule_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide what is quantized and how."""
    options = (
        bits_option,
        group_option,
        click.option("--asymmetric", is_flag=True, help="A zero point for each group."),
        click.option("--method", default="auto", show_default=True,
                     help="rtn, hqq, gptq, awq, smoothquant, some joined by +, best or auto."),
        click.option("--observer", default="minmax", show_default=True),
        click.option("--activation-bits", type=click.Choice(["8"]), help="Quantize activations."),
        click.option("--keep-float", multiple=True, metavar="NAME",
                     help="A name, parent, glob or re:… that stays float; may be repeated."),
        click.option("--skip-param-threshold", type=int, help="Smaller layers stay float."),
        click.option("--samples", type=int, default=150, show_default=True,
                     help="Calibration samples used at most."),
        click.option("--min-sqnr", type=float, help="Fail (status 1) below this output SQNR, dB."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@cli.command("quantize", help=f"Quantize MODEL and save it.\n{MODEL_HELP}")
@click.argument("model")
@data_option
@click.option("--output", type=click.Path(path_type=Path), help="Where to save the model.")
@click.option("--dry-run", is_flag=True, help="Print the decisions without touching a weight.")
@rule_options
@json_option
def quantize_command(
    model: str, data: str | None, output: Path | None, dry_run: bool, as_json: bool, **rules: Any
) -> None:
    """Quantize MODEL and save it."""
    out = Output(as_json)
    with exit_statuses():
        source, batches = load_source(model), load_data(data)
        min_sqnr = rules.pop("min_sqnr")
        options = _options(rules)
        if dry_run:
            keys = ("bits", "group_size", "modules_to_not_convert", "skip_param_threshold")
            example = None if batches is None else _example(batches, source)
            info = plan(source, example, **{key: options[key] for key in keys})
        elif batches is None:
            for key in ("observer", "num_calibration_samples"):
                options.pop(key)
            qmodel, info = quantize(source, accuracy_warning="ignore", **options)
        else:
            qmodel, info = static_quantize(source, batches, accuracy_warning="ignore", **options)
        out.text(info.table())
        for warning in info.warnings:
            out.text(f"warning: {warning}")
        if not dry_run:
            out.text(
                f"{info.original_size_mb:.2f} MB -> {info.quantized_size_mb:.2f} MB "
                f"({info.compression_ratio:.2f}x), output SQNR {format_db(info.sqnr_db) or '?'} dB"
            )
        is_refused = min_sqnr is not None and not _reaches(info.sqnr_db, min_sqnr)
        if output is not None and not dry_run and not is_refused:
            save_model(qmodel, output, info)
            out.text(f"saved to {output}")
        out.result(info.to_dict())
    if is_refused:
        raise SystemExit(CHECK_FAILED)


@cli.command("sensitivity", help=f"Print what quantizing each layer costs.\n{MODEL_HELP}")
@click.argument("model")
@data_option
@bits_option
@group_option
@click.option(
    "--method", type=click.Choice(SENSITIVITY_METHODS), default="local", show_default=True
)
@click.option(
    "--rounding", type=click.Choice(ROUNDINGS), default="auto", show_default=True,
    help="The method that makes the layers; rtn is much faster.",
)  # fmt: skip
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to explore.")
@click.option("--csv", type=click.Path(path_type=Path), help="Write the rows as CSV.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the report as JSON.")
@json_option
def sensitivity_command(
    model: str, data: str | None, bits: str, group_size: int, method: str, rounding: str,
    html: Path | None, csv: Path | None, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print what quantizing each layer costs."""
    out = Output(as_json)
    with exit_statuses():
        batches = load_data(data)
        if batches is None:
            raise OptionError(
                "sensitivity",
                found="no --data",
                needed="calibration data",
                remedy="Pass --data package.module:function.",
            )
        report = sensitivity(
            load_source(model), batches, bits=int(bits), group_size=group_size, method=method,
            rounding=rounding,
        )  # fmt: skip
        out.text(report.table())
        out.text(f"output SQNR {format_db(report.output_sqnr_db)} dB with all of them quantized")
        if html is not None:
            report.to_html(html)
        if csv is not None:
            report.to_csv(csv)
        if output is not None:
            report.to_json(output)
        out.result(report.to_dict())


@cli.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--draw", "picture", type=click.Path(path_type=Path), help="A .dot, .svg or .html.")
@json_option
def inspect(file: Path, picture: Path | None, as_json: bool) -> None:
    """Print what a saved FILE holds: the ledger, the sizes, how it was traced."""
    out = Output(as_json)
    with exit_statuses():
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


@cli.command()
@click.argument("before")
@click.argument("after")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page to explore.")
@json_option
def diff(before: str, after: str, html: Path | None, as_json: bool) -> None:
    """Print what changed from BEFORE to AFTER, two saved files."""
    out = Output(as_json)
    with exit_statuses():
        changes = diff_graphs(load_graph(before), load_graph(after))
        if html is not None:
            changes.to_html(html)
        out.text(changes)
        out.result(changes.to_dict())


@cli.command()
@click.argument("report", type=click.Path(path_type=Path))
@click.option("--min-sqnr", type=float, help="The least output SQNR, in dB.")
@click.option("--max-drop", type=float, help="How far any figure may fall below the baseline, dB.")
@click.option("--baseline", type=click.Path(path_type=Path), help="An older report.")
@json_option
def check(
    report: Path, min_sqnr: float | None, max_drop: float | None, baseline: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Hold a saved model or a JSON REPORT against a bar; status 1 and the nodes' names if not."""
    out = Output(as_json)
    with exit_statuses():
        failures = check_report(
            load_report(report),
            min_sqnr_db=min_sqnr,
            max_drop_db=max_drop,
            baseline=None if baseline is None else load_report(baseline),
        )
        for failure in failures:
            out.text(f"failed: {failure}")
        out.text("the bar holds" if not failures else f"{len(failures)} figures broke the bar")
        out.result({"failures": [vars(failure) for failure in failures]})
    if failures:
        raise SystemExit(CHECK_FAILED)


def main() -> None:
    """Run the command line."""
    cli()


def _options(rules: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `static_quantize` from the command line's."""
    activation_bits = rules["activation_bits"]
    return {
        "bits": int(rules["bits"]),
        "group_size": rules["group_size"],
        "symmetric": not rules["asymmetric"],
        "method": rules["method"],
        "observer": rules["observer"],
        "activation_bits": None if activation_bits is None else int(activation_bits),
        "modules_to_not_convert": list(rules["keep_float"]),
        "skip_param_threshold": rules["skip_param_threshold"],
        "num_calibration_samples": rules["samples"],
    }


def _example(batches: Any, model: Any) -> Call | None:
    first = next(iter(batches), None)
    return None if first is None else as_call(first, model)


def _reaches(found: float | None, needed: float) -> bool:
    if found is not None and found >= needed:
        return True
    shown = "not measured: pass --data" if found is None else f"{found:.2f} dB"
    click.echo(f"fxquant: output SQNR is {shown}, needs {needed:g} dB; nothing is saved", err=True)
    return False
