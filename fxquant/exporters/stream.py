"""Quantize a Hugging Face folder into another: the model is never in memory as a whole.

The folder's config says what the layers are called (the model is made with its parameters on the
meta device), and the rules decide about them. Without data each tensor is read, rounded if it is
the weight of a chosen layer, and written. With data the blocks come one after the other, see
`blockwise.py`; what lies outside of them is treated as without data. A killed run is gone on with,
see `unfinished.py`.
"""

import hashlib
import json
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fxquant.config.memory import memory_bytes
from fxquant.config.method import Recipe, parse_method
from fxquant.config.option_checks import check_not_fused
from fxquant.config.quant_config import QuantConfig, as_config
from fxquant.distributed.processes import Processes
from fxquant.errors import OptionError, check_path
from fxquant.exporters.blockwise import Blockwise
from fxquant.exporters.checkpoint import copy_other_files
from fxquant.exporters.compressed_tensors import CompressedTensors
from fxquant.exporters.experts import experts_parameters
from fxquant.exporters.folder_reader import CONFIG, FolderReader
from fxquant.exporters.folder_writer import FolderWriter
from fxquant.exporters.meta_model import meta_model
from fxquant.exporters.model_weights import ModelWeights
from fxquant.exporters.unfinished import UnfinishedFolder
from fxquant.graph.calls import Call
from fxquant.graph.left_alone import process_left_alone
from fxquant.measure.quantization_info import QuantizationInfo, check_accuracy_warnings
from fxquant.measure.sizes import MEGABYTE
from fxquant.passes.calibration_data import drawn_calls
from fxquant.passes.check_alike import call_digests
from fxquant.passes.decide import Decision, add_notes, decide, why_float
from fxquant.passes.token_noise import check_has_batches
from fxquant.tracing.opaque import graph_of_layers

SHARD_BYTES = 256 * 10**6  # of the float tensors that a file is made of, where it is no block's


def quantize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: QuantConfig | Mapping[str, Any] | str | Path | None = None,
    data: Iterable[object] | None = None,
    *,
    memory: int | str | None = None,
    resume: bool = True,
    group: "dist.ProcessGroup | None" = None,
) -> QuantizationInfo:
    """Quantize a folder of any size into another, without the model in memory.

    Without data, weights are rounded one by one, by `"rtn"` or `"hqq"`. With data, the blocks of
    the model (the layers of its one `ModuleList`) are read, fitted to what the quantized blocks
    before them return, written and freed; layers outside of the blocks are rounded as without data.
    The result is a compressed-tensors folder, which transformers and vLLM read; each weight is read
    back before its file counts. What the format cannot hold is avoided, as with
    `target="compressed-tensors"`.

    Args:
        source: a folder that `save_pretrained` wrote, with safetensors.
        target: the new folder; free, or an empty folder. Until all of it is written it is called
            `TARGET.unfinished`.
        config: as in `quantize`. With data, `method` is `"gptq"` (`"auto"` is the same here),
            `"best"`, `"rtn"` or `"hqq"`.
        data: None, or calls of the model, as in `quantize`.
        memory: as in `quantize`: that values between layers and blocks may take, with those in
            work. The result is the same, bit for bit.
        resume: whether to go on with what an interrupted run of the same call left. The files have
            the same bits then.
        group: of processes that share the work, as in `quantize`; all of them see the source and
            the target. The files are the same, bit for bit.

    Returns:
        The record; figures of accuracy are measured with data only, on rows that chose no integer.

    Raises:
        OptionError: an option, the source or its model is not usable.
        CalibrationError: the data is not usable.
        WeightError: a weight cannot be quantized; the layer is named.
        SaveError: the target cannot be written, or a weight does not read back.
        AccuracyError: the accuracy is below what `config` asks for; no folder is left.
        ProcessGroupError: another process of the group has failed.
    """
    check_path("target", target)
    processes = Processes.of(group)
    with processes.together():
        return _quantize(
            source, Path(target), as_config(config, {}), data, memory, resume, processes
        )


def _quantize(
    source: str | os.PathLike[str],
    target: Path,
    config: QuantConfig,
    data: Iterable[object] | None,
    memory: int | str | None,
    resume: bool,
    processes: Processes,
) -> QuantizationInfo:
    """What `quantize_checkpoint` does, in each of the processes."""
    made = for_folder(config)
    recipe = parse_method(made.method, has_data=data is not None)
    most_bytes = memory_bytes(memory)
    base = FolderReader(source)
    with process_left_alone():
        decisions, weights = decided(base, made)
        blockwise, drawn = None, list[Call]()
        if data is None:
            check_has_batches(made.token_noise)
        else:
            fitting = for_blocks(made, recipe)
            drawn = drawn_calls(data, weights.model, made.num_calibration_samples)
            blockwise = Blockwise(weights, decisions, fitting, drawn, most_bytes, processes)
        rounding = "rtn" if recipe.rounding == "gptq" else recipe.rounding
        writer = FolderWriter(weights, decisions, made, rounding)
        blocks = [] if blockwise is None else blockwise.shards(base.files)
        rest = _shards(base, {name for names in blocks for name in names})
        count = len(blocks) + len(rest)
        identity = _identity(base, made, drawn)
        unfinished = _opened(target, identity, count, resume, processes)
        for number, names in enumerate(rest, start=len(blocks)):
            if number % processes.count == processes.rank:
                writer.shard(unfinished, number, names)
        processes.meet()
        sqnr_db = None if blockwise is None else blockwise.run(writer, unfinished)
    processes.meet()  # all have read what they need of the folder before it gets another name
    if processes.rank > 0:  # the first process finishes the folder
        return processes.broadcast(None, 0)
    copy_other_files(base.path, unfinished.path)
    text = json.dumps(writer.new_config(), indent=2) + "\n"
    (unfinished.path / CONFIG).write_text(text, "utf-8")
    known = [unfinished.notes(number) or {} for number in range(count)]
    size = sum(notes["bytes"] for notes in known)
    for reasons in ({} if blockwise is None else blockwise.notes, *(n["reasons"] for n in known)):
        decisions = add_notes(decisions, reasons)
    info = QuantizationInfo(
        decisions,
        config=made,
        method=recipe.name,
        calibration_samples_used=sum(call.row_count for call in drawn),
        heldout_samples=0 if blockwise is None else blockwise.heldout_samples,
        sqnr_db=sqnr_db,
        original_size_mb=sum(base.nbytes(name) for name in base.files) / MEGABYTE,
        quantized_size_mb=size / MEGABYTE,
    )
    check_accuracy_warnings(
        info, made.sqnr_warning_threshold, made.sqnr_error_threshold, made.accuracy_warning
    )
    unfinished.finish(size)
    return processes.broadcast(info, 0)


def _opened(
    target: Path,
    identity: dict[str, Any],
    count: int,
    resume: bool,
    processes: Processes,
) -> UnfinishedFolder:
    """The folder on its way; the first process makes it, or makes room for it.

    Args:
        target: what it will be called.
        identity: of the run.
        count: of shards.
        resume: whether to go on with what an interrupted run left.
        processes: all of them see the folder.
    """
    remedy = "Call it with the same arguments, on a file system that all processes see."
    text = json.dumps(identity, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    processes.check_alike("source, options and data", digest, remedy)
    if processes.rank > 0:
        processes.meet()
        return UnfinishedFolder(target, identity, count, resume=True)
    made = UnfinishedFolder(target, identity, count, resume=resume)
    processes.meet()
    return made


def for_folder(config: QuantConfig) -> QuantConfig:
    """The config, kept to what the format of the new folder can hold."""
    name = CompressedTensors.target.name
    check_not_fused(config.fuse, "a folder, which has the layers of the model")
    if config.target not in (None, name):
        raise OptionError(
            "target",
            found=repr(config.target),
            needed=f"{name!r}, the format of the new folder",
            remedy="Leave it out, or load the model, quantize it and call fxquant.export.",
        )
    if config.activation_bits is not None:
        raise OptionError(
            "activation_bits",
            found=f"{config.activation_bits} bits",
            needed=f"float activations: of the {name} folder weights alone are made here",
            remedy="Leave it out, or load the model, quantize it and call fxquant.export.",
        )
    return config.changed(target=name)


def for_blocks(config: QuantConfig, recipe: Recipe) -> QuantConfig:
    """The config for fitting blocks; one whose steps need the whole model is refused."""
    if recipe.scalings:
        raise OptionError(
            "method",
            found=f"{config.method!r} for a model that is never whole in memory",
            needed="'gptq', 'best', 'rtn' or 'hqq', which scale no channels",
            remedy="Choose one of them, or load the model and call fxquant.quantize.",
        )
    return config.changed(method="gptq") if config.method == "auto" else config


def _identity(base: FolderReader, config: QuantConfig, drawn: Sequence[Call]) -> dict[str, Any]:
    """What a run is made of: an interrupted one is gone on with if this is the same."""
    paths = [base.path / file for file in dict.fromkeys(base.files.values())]
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    data = call_digests(drawn)
    return {"files": stats, "config": base.config, "options": config.to_dict(), "data": data}


def decided(base: FolderReader, config: QuantConfig) -> tuple[list[Decision], ModelWeights]:
    """The decisions on the folder's layers, and the model without weights."""
    if "quantization_config" in base.config:
        raise OptionError(
            f"the folder {os.fspath(base.path)!r}",
            found="a model that is quantized already",
            needed="a float model",
            remedy="Name the folder of the float model.",
        )
    advice = "Load the model yourself, and call fxquant.quantize and fxquant.export."
    model = meta_model(base.path, advice)
    config_of_model: Any = model.config
    if getattr(config_of_model, "use_cache", False):
        config_of_model.use_cache = False  # blocks are called without a cache of keys and values
    weights = ModelWeights(base, model)
    experts = experts_parameters(model)
    layers = {e.name: e.layer_on(model.get_parameter(name)) for name, e in experts.items()}
    one_by_one = [
        e.name
        for e in experts.values()
        if not e.is_transposed and weights.rows_of(e.name) is not None
    ]
    found = decide(graph_of_layers(model, layers), config, one_by_one)
    decisions = [_without_tracing(decision) for decision in found]
    if all(decision.bits is None for decision in decisions):
        raise OptionError(
            "config",
            found=f"rules that leave every layer float ({why_float(decisions)})",
            needed="a layer that is quantized",
            remedy="Choose a group_size that divides the layers' inputs, or skip fewer layers. "
            "Layers of other classes than nn.Linear can be quantized in memory, with quantize.",
        )
    for decision in decisions:
        rows = None if decision.bits is None else weights.rows_of(decision.module)
        count = sum(map(len, rows.values())) if rows else 0
        if decision.bits is not None and count != math.prod(decision.shape[:-1]):
            raise OptionError(
                decision.module,
                found=f"no tensor {decision.module}.weight of shape {list(decision.shape)} in the "
                "folder, nor others that make it up row by row",
                needed="each chosen layer's weight under its name, or one that transformers knows",
                remedy="Leave it float with modules_to_not_convert, or load the model and call "
                "fxquant.quantize.",
            )
    return decisions, weights


def _without_tracing(decision: Decision) -> Decision:
    """The decision about code of a model that nothing tried to trace."""
    if decision.rule != "opaque":
        return decision
    why = f"{decision.kind} is no layer that is known without tracing the model"
    return replace(decision, rule="op table", reason=why)


def _shards(base: FolderReader, without: Collection[str]) -> list[list[str]]:
    """Which tensors of the source go into which file, in their order."""
    shards: list[list[str]] = []
    size = 0
    for name in base.files:
        if name in without:
            continue
        if not shards or size + base.nbytes(name) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += base.nbytes(name)
    return shards
