"""`lmscale generate` and `lmscale evaluate`: parse, call, print.

Under torchrun (`torchrun --no-python --nproc-per-node 2 lmscale generate ...`) the ranks share the model by tensor
parallelism, and rank 0 prints.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lmscale.evaluate.inference import LanguageModel
    from lmscale.evaluate.perplexity import HeldOutLoss


class Precision(StrEnum):
    """Arithmetic of the model."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's directory: its newest one.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Left out: the GPU where there is one.")]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Left out: the run's.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Left out: 128, or what the prompt leaves of the model's positions.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; lower is less varied.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw among the K likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that add up to P.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text. Left out: another text each time.")] = None,
    device: Device = None,
    precision: PrecisionOption = None,
) -> None:
    """Write text: the prompt and how a checkpoint goes on from it, to the end of the document or of the room."""
    with _opened(checkpoint, device, precision) as model:
        (text,) = model.generate(prompt, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    if _is_first_rank():
        typer.echo(text)


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="A tokenized corpus. Repeatable. Left out: the run's held-out corpora."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples read at a time. Left out: the run's micro batch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    device: Device = None,
    precision: PrecisionOption = None,
) -> None:
    """Measure a checkpoint's loss and perplexity on tokenized text, every window once."""
    with _opened(checkpoint, device, precision) as model:
        from lmscale.evaluate.perplexity import measure_corpus

        prefixes = data or [source.prefix for source in model.config.data.valid]
        if not prefixes:
            raise ConfigError("is missing, and the run has no data.valid", field="--data", remedy="name a PREFIX")
        measured = [measure_corpus(model, prefix, batch_size, show_progress=True) for prefix in prefixes]
    if _is_first_rank():
        _print_losses(measured, as_json)


@contextlib.contextmanager
def _opened(checkpoint: Path, device: str | None, precision: Precision | None) -> Iterator[LanguageModel]:
    """Load a model, and leave its process groups at the end."""
    if not checkpoint.is_dir():
        raise CheckpointError("does not exist", field="checkpoint", value=str(checkpoint))
    from lmscale.launcher.environment import adopt_rank
    from lmscale.log import get_logger, setup_logging

    adopt_rank()
    # stdout is for the result; DeepSpeed's logger takes hold of it while it is imported, until setup_logging.
    with contextlib.redirect_stdout(io.StringIO()):
        from lmscale.evaluate.inference import load
        from lmscale.parallel.topology import close_topology

        setup_logging(int(os.environ.get("RANK", "0")))
        get_logger("lmscale").setLevel(logging.WARNING)
        model = load(checkpoint, device, precision and precision.value)
    yield model
    close_topology()


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_losses(measured: list[HeldOutLoss], as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        rows = [{**asdict(loss), "perplexity": loss.perplexity} for loss in measured]
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    numbers = [Column(name, justify="right") for name in ("windows", "tokens", "loss, nats per token", "perplexity")]
    table = Table("corpus", *numbers)
    for loss in measured:
        figures = f"{loss.num_windows:,}", f"{loss.num_tokens:,}", f"{loss.loss:.4f}", f"{loss.perplexity:.2f}"
        table.add_row(loss.prefix, *figures)
    Console().print(table)
