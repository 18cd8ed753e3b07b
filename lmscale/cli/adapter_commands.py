"""`lmscale adapter ...`: look at adaptations, compare methods, merge, exchange with PEFT: parse, call, print."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.cli.adapter_compare import compare

if TYPE_CHECKING:
    from lmscale.convert.peft import Exchanged

adapter_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

Adaptation = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="An adaptation's checkpoint, or its run's directory: the newest one. PATH#N: one of several, from 0.",
    ),
]
Output = Annotated[Path, typer.Argument(metavar="OUTPUT", help="A new directory.")]
Base = Annotated[Path | None, typer.Option(metavar="BASE", help="The base's checkpoint. Left out: where it was.")]


@adapter_app.command()
def inspect(
    checkpoint: Adaptation,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Show an adaptation: its method, its base, what it holds and how far it was trained."""
    import json

    with _silent():
        from lmscale.train.adapted_show import describe
    facts = describe(checkpoint)
    if as_json:
        typer.echo(json.dumps(facts, indent=1))
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else value
        typer.echo(f"{key.replace('_', ' '):{width}}  {shown}")


@adapter_app.command()
def merge(checkpoint: Adaptation, output: Output, base: Base = None) -> None:
    """Write the whole model that lora or bitfit makes of its base."""
    with _silent():
        from lmscale.convert.merging import merge_adaptation
    merged = merge_adaptation(checkpoint, output, base)
    typer.echo(f"{output}: {merged.method} merged, {merged.num_changed:,} tensors changed")


@adapter_app.command()
def unmerge(
    checkpoint: Adaptation,
    merged: Annotated[Path, typer.Argument(metavar="MERGED", help="What merge made of the adaptation.")],
    output: Output,
    base: Base = None,
) -> None:
    """Write the base again that an adaptation was merged into, within the rounding of fp32."""
    with _silent():
        from lmscale.convert.merging import unmerge_adaptation
    done = unmerge_adaptation(checkpoint, merged, output, base)
    typer.echo(f"{output}: {done.method} taken out, {done.num_changed:,} tensors changed")


@adapter_app.command("export-peft")
def export_peft(
    checkpoint: Adaptation, output: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.")]
) -> None:
    """Write an adaptation as PEFT does: adapter_config.json and adapter_model.safetensors."""
    with _silent():
        from lmscale.convert.peft import export_peft as export
    _report(output, export(checkpoint, output))


@adapter_app.command("import-peft")
def import_peft(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="adapter_config.json and adapter_model.safetensors.")
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A new directory.")],
    base: Annotated[Path, typer.Option(metavar="BASE", help="The base's checkpoint (lmscale import-hf makes one).")],
) -> None:
    """Make an adaptation's checkpoint of what PEFT wrote: LoRA, prefix tuning or prompt tuning."""
    with _silent():
        from lmscale.convert.peft import import_peft as take
    _report(checkpoint, take(directory, checkpoint, base))


adapter_app.command()(compare)


def _report(target: Path, exchanged: Exchanged) -> None:
    typer.echo(f"{target}: {exchanged.method}, {exchanged.num_parameters:,} parameters")
    for note in exchanged.notes:
        typer.echo(f"note: {note}", err=True)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Import quietly: stdout is for the result, and DeepSpeed's logger writes there while it is imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
