"""The commands that take a float model: `plan`, `quantize` and `sensitivity`."""

from pathlib import Path
from typing import Any

import click

from fxquant.analysis.sensitivity import METHODS, Analysis, sensitivity
from fxquant.cli.options import (
    MODEL_HELP,
    bits_option,
    config_of,
    data_option,
    group_option,
    json_option,
    memory_option,
    path_option,
    rule_options,
)
from fxquant.cli.output import CHECK_FAILED, Output
from fxquant.cli.sources import load_data, load_source
from fxquant.cli.torchrun import torchrun_group
from fxquant.config.method import UNSCALED
from fxquant.config.quant_config import QuantConfig
from fxquant.errors import OptionError, check_number
from fxquant.exporters.stream import quantize_checkpoint
from fxquant.measure.quantization_info import QuantizationInfo
from fxquant.pipeline import quantize
from fxquant.planning.plan import plan
from fxquant.report.tables import format_db
from fxquant.serialization.files import save_model

SHOWN_WARNINGS = 3


@click.command(
    "quantize",
    help=f"Quantize MODEL and save it.\n{MODEL_HELP}",
    short_help="Quantize a model and save it.",
)
@click.argument("model")
@data_option
@path_option(
    "--output",
    "Where to save the model. Of a FOLDER, a path that does not end in .safetensors is a new "
    "compressed-tensors folder, made block by block: the model is never in memory as a whole.",
)
@click.option("--dry-run", is_flag=True, help="What `fxquant plan` prints, for this run.")
@click.option("--table", is_flag=True, help="Print a line for each layer.")
@rule_options
@click.option(
    "--average-bits",
    type=float,
    metavar="X",
    help="Measure each layer, and spend this many bits a weight where they pay.",
)
@memory_option
@click.option(
    "--min-sqnr",
    type=float,
    metavar="DB",
    help="Save nothing and fail (status 1) below this output SQNR.",
)
@json_option
def quantize_command(
    model: str, data: str | None, output: Path | None, dry_run: bool, table: bool,
    average_bits: float | None, memory: str | None, min_sqnr: float | None, as_json: bool,
    **rules: Any,
) -> None:  # fmt: skip
    """Quantize MODEL and save it; under torchrun, the first process saves it and speaks."""
    with torchrun_group() as is_first, Output(as_json, is_muted=not is_first).running() as out:
        config = config_of(rules).changed(accuracy_warning="ignore")
        if min_sqnr is not None:
            check_number("--min-sqnr", min_sqnr)
        if dry_run:
            print_plan(out, model, data, config, memory, output)
            return
        if output is not None and _is_folder_to_folder(model, output):
            _refuse_whole(average_bits, min_sqnr)
            given = load_data(data, model)
            info = quantize_checkpoint(model, output, config, given, memory=memory)
            out.text(info.table() if table else summary(info, output, None))
            out.result(info.to_dict())
            return
        source, batches = load_source(model), load_data(data, model)
        qmodel, info = quantize(source, batches, config, average_bits=average_bits, memory=memory)
        if table:
            out.text(info.table())
        is_enough = info.sqnr_db is not None and info.sqnr_db >= (min_sqnr or 0)
        is_refused = min_sqnr is not None and not is_enough
        if output is not None and not is_refused and is_first:
            save_model(qmodel, output, info)
        out.text(summary(info, output, min_sqnr if is_refused else None))
        out.result(info.to_dict())
        if is_refused:
            shown = "not measured" if info.sqnr_db is None else f"{info.sqnr_db:.2f} dB"
            text = f"fxquant: output SQNR is {shown}, needs {min_sqnr:g} dB; nothing is saved"
            click.echo(text, err=True)
            raise SystemExit(CHECK_FAILED)


@click.command(
    "plan",
    help="Print what would be quantized, and why, and the memory, disk and time that it would "
    f"take, without touching a weight.\n{MODEL_HELP}",
    short_help="What would be quantized, and what it takes.",
)
@click.argument("model")
@data_option
@rule_options
@memory_option
@json_option
def plan_command(
    model: str, data: str | None, memory: str | None, as_json: bool, **rules: Any
) -> None:
    """Print what would be quantized, and what it takes; of a folder, into another folder."""
    with Output(as_json).running() as out:
        print_plan(out, model, data, config_of(rules), memory, None)


def print_plan(
    out: Output,
    model: str,
    data: str | None,
    config: QuantConfig,
    memory: str | None,
    output: Path | None,
) -> None:
    """Print the decisions and the forecast of a run; a folder becomes a folder, or `output`."""
    becomes_folder = _is_folder_to_folder(model, output or Path(model))
    source, batches = model if becomes_folder else load_source(model), load_data(data, model)
    info = plan(source, batches, config, memory=memory)
    out.text(info)
    out.result(info.to_dict())


def summary(info: QuantizationInfo, output: Path | None, missed: float | None) -> str:
    """Ten lines on what was done: layers, sizes, accuracy, warnings, the file."""
    accuracy = "not measured: pass --data"
    if info.sqnr_db is not None:
        rows = f"{info.heldout_samples} rows held out" if info.heldout_samples else "the same rows"
        accuracy = f"{format_db(info.sqnr_db)} dB, measured on {rows}"
    file = "none: pass --output to save the model" if output is None else str(output)
    if missed is not None:
        file = f"nothing is saved, since --min-sqnr needs {missed:g} dB"
    warnings = info.warnings[:SHOWN_WARNINGS]
    more = len(info.warnings) - len(warnings)
    lines = [
        f"layers       {len(info.selected_layers)} quantized, {len(info.skipped_layers)} left "
        "float (--table lists them with the reasons)",
        f"method       {info.method}",
        f"size         {info.original_size_mb:.2f} MB -> {info.quantized_size_mb:.2f} MB, "
        f"{info.compression_ratio:.2f} times smaller",
        f"output SQNR  {accuracy}",
        *(f"warning      {warning}" for warning in warnings),
        *([f"             and {more} more warnings (--json lists them)"] if more else []),
        f"file         {file}",
    ]
    return "\n".join(lines)


def _is_folder_to_folder(model: str, output: Path) -> bool:
    """Whether a folder becomes a folder: then no more of it than a block is in memory."""
    return output.suffix != ".safetensors" and Path(model).is_dir()


def _refuse_whole(average_bits: float | None, min_sqnr: float | None) -> None:
    """Refuse what needs the whole model."""
    for option, value in (("--average-bits", average_bits), ("--min-sqnr", min_sqnr)):
        if value is not None:
            raise OptionError(
                option,
                found=f"{value:g} for a folder that becomes a folder",
                needed="the whole model in memory",
                remedy="Pass an --output that ends in .safetensors, and --data.",
            )


@click.command("sensitivity", help=f"Print what quantizing each layer costs.\n{MODEL_HELP}")
@click.argument("model")
@data_option
@bits_option
@group_option
@click.option(
    "--analysis", "--method", "analysis",
    type=click.Choice(METHODS), default="local", show_default=True,
    help="local: each layer's own error. gradient, exact: the output's, for each layer alone.",
)  # fmt: skip
@click.option(
    "--rounding", type=click.Choice(UNSCALED), default="auto", show_default=True,
    help="The method that makes the layers; rtn is much faster.",
)  # fmt: skip
@path_option("--html", "Write a page to explore.")
@path_option("--csv", "Write the rows as CSV.")
@path_option("--output", "Write the report as JSON.")
@json_option
def sensitivity_command(
    model: str, data: str | None, bits: str, group_size: int, analysis: Analysis, rounding: str,
    html: Path | None, csv: Path | None, output: Path | None, as_json: bool,
) -> None:  # fmt: skip
    """Print what quantizing each layer costs."""
    with torchrun_group() as is_first, Output(as_json, is_muted=not is_first).running() as out:
        batches = load_data(data, model)
        if batches is None:
            raise OptionError(
                "sensitivity",
                found="no --data",
                needed="calibration data",
                remedy="Pass --data, for example package.module:function.",
            )
        report = sensitivity(
            load_source(model), batches, bits=int(bits or 4), rounding=rounding, analysis=analysis,
            group_size=128 if group_size is None else group_size,
        )  # fmt: skip
        out.text(report.table())
        out.text(f"output SQNR {format_db(report.output_sqnr_db)} dB with all of them quantized")
        if html is not None and is_first:
            report.to_html(html)
        if csv is not None and is_first:
            report.to_csv(csv)
        if output is not None and is_first:
            report.to_json(output)
        out.result(report.to_dict())
