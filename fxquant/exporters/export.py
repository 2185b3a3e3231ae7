"""`export` and `check_export`: quantized models in the formats of other runtimes."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn
from torch.fx import GraphModule

from fxquant.errors import OptionError, check_choice
from fxquant.exporters.findings import Finding, refuse_losses
from fxquant.exporters.gguf import Gguf
from fxquant.exporters.load import CHECKPOINT_FORMATS, load_checkpoint
from fxquant.exporters.onnx import Onnx
from fxquant.exporters.pt2 import Pt2
from fxquant.exporters.source import Source, source_of
from fxquant.fusion.fused import fused_nodes
from fxquant.graph.left_alone import process_left_alone


class ExportFormat(Protocol):
    """A format with its options chosen."""

    def findings(self, source: Source) -> Iterator[Finding]:
        """What would be lost."""

    def write(self, source: Source, path: str | os.PathLike[str]) -> None:
        """Write, read back, put in place."""


FORMATS: dict[str, type[Any]] = {
    **CHECKPOINT_FORMATS,
    "onnx": Onnx,
    "gguf": Gguf,
    "pt2": Pt2,
}


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    format: str,
    **options: Any,
) -> list[Finding]:
    """Write a quantized model in the format of another runtime, without changing a number.

    Args:
        model: a quantized graph, a swapped model, the path of a saved file, or a folder that
            `load_checkpoint` reads.
        path: where to: a new folder, or a file, which is replaced at once or not at all.
        format: `"compressed-tensors"`, `"gptq"` or `"awq"`: a Hugging Face folder, with the config,
            the tokenizer and the names of the float model's folder `base=`. `"onnx"`: a file, or a
            folder where `path` does not end in .onnx. `"gguf"`: a file, from `base=`, the GGUF
            file of the float model. `"pt2"`: a file of torch.export.
        **options: of the format; docs/runtimes.md describes them.

    Returns:
        The findings that are no losses: runtimes that are known not to take the files.

    Raises:
        OptionError: the format or an option is unknown, or a library is missing.
        SaveError: the format cannot hold the model, with what to do; or the files cannot be
            written, or do not read back equal. Nothing is left behind.
    """
    chosen = _format(format, options)
    with process_left_alone():
        source = _source(model)
        findings = _findings(chosen, source)
        refuse_losses(format, findings)
        chosen.write(source, path)
    return findings


def check_export(
    model: nn.Module | str | os.PathLike[str], format: str, **options: Any
) -> list[Finding]:
    """What an export would lose, where, and what to do; nothing is written.

    Args:
        model: a quantized graph, a swapped model, the path of a saved file, or a folder that
            `load_checkpoint` reads.
        format: as in `export`.
        **options: as in `export`; with `base`, whether the folder belongs to the model.

    Raises:
        OptionError: the format or an option is unknown.
    """
    chosen = _format(format, options)
    return _findings(chosen, _source(model))


def _findings(chosen: ExportFormat, source: Source) -> list[Finding]:
    """What would be lost: of a fused graph everything, but in a file of torch.export."""
    fused = fused_nodes(source.model) if isinstance(source.model, GraphModule) else []
    if fused and not isinstance(chosen, Pt2):
        problem = "a part of a fused graph, which runtimes fuse in ways of their own"
        return [Finding(name, problem, "Export the graph that fuse was given.") for name in fused]
    return list(chosen.findings(source))


def _source(model: nn.Module | str | os.PathLike[str]) -> Source:
    """What there is to export; a folder is a checkpoint in another format."""
    if isinstance(model, str | os.PathLike) and os.path.isdir(model):
        model = load_checkpoint(model)
    return source_of(model)


def _format(format: str, options: dict[str, Any]) -> ExportFormat:
    check_choice("format", format, FORMATS)
    known = [field.name for field in dataclasses.fields(FORMATS[format])]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise OptionError(
            f"export to {format}",
            found=f"unknown options {unknown}",
            needed=f"options among {known}",
            remedy="Correct the spelling or leave the option out.",
        )
    made: ExportFormat = FORMATS[format](**options)
    return made
