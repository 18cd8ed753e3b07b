"""`lmscale preview`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmscale.optim.preview import Preview


def preview(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys to override, as in optim.lr=3e-4.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw rate, batch size, sequence length and tokens into this PNG.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print milestones and some hundred steps as JSON.")] = False,
) -> int:
    """Show what a run's schedules will do: rate, batch size, sequence length, weight decay and tokens by step."""
    from lmscale.config.adapt import prompt_length
    from lmscale.config.io import load_run
    from lmscale.errors import ConfigError
    from lmscale.optim.preview import preview as compute
    from lmscale.tasks.resolve import resolve_task

    if plot is not None and plot.suffix != ".png":
        raise ConfigError("must be the name of a .png", field="--plot", value=str(plot))
    config = load_run(run, overrides or ())
    found = compute(resolve_task(config, prompt_length(config.adapt)))
    if json:
        from json import dumps

        typer.echo(dumps(found.as_json(), indent=1))
    else:
        _print_table(found)
    if plot is not None:
        from lmscale.optim.preview_plot import plot_preview

        plot_preview(found, plot, title=run)
    return 0


def _print_table(preview: Preview) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from lmscale.optim.preview import short

    numbers = ("step", "tokens", "rate", "batch", "length", "decay")
    table = Table(
        Column("milestone", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in numbers),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption="tokens: consumed once the step is done; decay: the weight decay",
    )
    for what, point in preview.milestones:
        table.add_row(
            what,
            f"{point.step:,}",
            short(point.consumed_tokens),
            f"{point.lr:.3g}",
            f"{point.batch_size:,}",
            f"{point.seq_length:,}",
            f"{point.weight_decay:.4g}",
        )
    console = Console()
    console.print(table)
    console.print(f"{preview.steps:,} optimizer steps, {preview.samples:,} samples, {preview.tokens:,} tokens")
