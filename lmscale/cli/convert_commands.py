"""`lmscale import-hf` and `lmscale export-hf`: parse, call, print."""

from __future__ import annotations

import contextlib
import io
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.errors import CheckpointError

if TYPE_CHECKING:
    from lmscale.convert.importing import Converted


class Dtype(StrEnum):
    """How weights are written."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def import_hf(
    hf_dir: Annotated[
        Path, typer.Argument(metavar="HF_DIR", help="config.json, safetensors, and the tokenizer if there is one.")
    ],
    checkpoint_dir: Annotated[Path, typer.Argument(metavar="CHECKPOINT_DIR", help="A new directory.")],
) -> None:
    """Make a checkpoint from a Hugging Face directory: GPT-2, Llama, BERT, RoBERTa, BART or T5."""
    # stdout is for the result, and DeepSpeed's logger writes there while it is imported.
    with contextlib.redirect_stdout(io.StringIO()):
        from lmscale.convert.importing import import_hf as convert
    _report(checkpoint_dir, convert(hf_dir, checkpoint_dir))


def export_hf(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's directory: its newest one.")
    ],
    hf_dir: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A new directory.")],
    dtype: Annotated[Dtype, typer.Option(help="Of the weights; a checkpoint's own are fp32.")] = Dtype.fp32,
) -> None:
    """Make a Hugging Face directory, for from_pretrained, of a checkpoint of any layout."""
    if not checkpoint.is_dir():
        raise CheckpointError("does not exist", field="checkpoint", value=str(checkpoint))
    with contextlib.redirect_stdout(io.StringIO()):
        from lmscale.convert.exporting import export_hf as convert
    _report(hf_dir, convert(checkpoint, hf_dir, dtype.value))


def _report(target: Path, converted: Converted) -> None:
    typer.echo(f"{target}: {converted.model_type}, {converted.num_parameters:,} parameters")
    for note in converted.notes:
        typer.echo(f"note: {note}", err=True)
