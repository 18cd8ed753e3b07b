"""`lmscale checkpoint ...`: look at checkpoints, verify and reshape them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.errors import CheckpointError

if TYPE_CHECKING:
    from lmscale.train.checkpoint_show import Description

checkpoint_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@checkpoint_app.command("list")
def list_command(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory, its checkpoints/, or one of them.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List a run's checkpoints, the one to resume from first. Sizes are compared with the manifests, hashes are not."""
    from lmscale.train.checkpoint_show import checkpoints_under, describe

    found = [describe(path) for path in checkpoints_under(run)]
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        _print_table(found)


def _print_table(found: list[Description]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    numbers = ("tokens", "MB")
    columns = ("checkpoint", *numbers, "layout", "kind", "named by", "state")
    justified = (Column(name, justify="right" if name in numbers else "left", no_wrap=True) for name in columns)
    table, console = Table(*justified, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)), Console()
    for one in found:
        tokens = "" if one.tokens is None else f"{one.tokens:,}"
        size = "" if one.num_bytes is None else f"{one.num_bytes / 1e6:,.1f}"
        state = one.state if one.num_bytes is not None else "[red]bad[/]"
        table.add_row(one.name, tokens, size, one.layout or "", one.kind or "", ", ".join(one.pointers), state)
    console.print(table)
    for one in found:
        if one.num_bytes is None:
            console.print(f"{one.name}: {one.state}", highlight=False, markup=False, soft_wrap=True)


@checkpoint_app.command()
def verify(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="Checkpoints, or runs, of which all checkpoints are read.")
    ],
    threads: Annotated[int | None, typer.Option(min=1, help="Files read at a time. Left out: the CPUs.")] = None,
) -> None:
    """Read checkpoints and compare every file with the hash that it was written with; 2 where one is not whole."""
    from lmscale.train.checkpoint_show import checkpoints_under

    found = [checkpoint for path in paths for checkpoint in checkpoints_under(path)]
    problems = [problem for checkpoint in found for problem in _verify(checkpoint, threads)]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise CheckpointError(
            f"{len(problems)} files or manifests are not as they were written: see above",
            field="PATH",
            value=str(paths[0]) if len(paths) == 1 else ", ".join(map(str, paths)),
        )


def _verify(path: Path, threads: int | None) -> list[CheckpointError]:
    """Verify one checkpoint, say so in a line, and return what is wrong with it."""
    import time

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    from lmscale.train.checkpoint_show import verify

    console, start = Console(), time.perf_counter()
    columns = (TextColumn(escape(path.name)), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, advance=done, total=total)

        found = verify(path, threads, advance)
    for problem in found.problems:
        console.print(f"[red]bad[/] {escape(f'{path}: {problem.rule}')}", highlight=False, soft_wrap=True)
    if not found.problems:
        speed = found.num_bytes / 1e9 / max(time.perf_counter() - start, 1e-9)
        state = "[green]good[/]" if found.has_hashes else "[yellow]sizes only, it has no hashes[/]"
        what = f"{found.num_files} files, {found.num_bytes / 1e6:,.1f} MB, {speed:.2f} GB/s"
        console.print(f"{state} {escape(f'{path}: {what}')}", highlight=False, soft_wrap=True)
    return found.problems


@checkpoint_app.command()
def reshape(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run: its newest one.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to make.")],
    tp_size: Annotated[int, typer.Option(min=1, help="Tensor-parallel ranks.")] = 1,
    pp_size: Annotated[int, typer.Option(min=1, help="Pipeline stages.")] = 1,
    dp_size: Annotated[int, typer.Option(min=1, help="Data-parallel ranks.")] = 1,
    zero_stage: Annotated[
        int | None,
        typer.Option(min=0, max=3, help="Left out: the checkpoint's, or 1 in its place where a pipeline has no other."),
    ] = None,
) -> None:
    """Rewrite a checkpoint in the slices of another layout, of which each rank then reads its own file alone.

    Any checkpoint resumes on any layout without that: it saves many ranks the reading of what is not theirs.
    """
    import resource
    import time

    from lmscale.config.checkpoint_paths import resolve_checkpoint
    from lmscale.train.checkpoint_files import read_manifest
    from lmscale.train.checkpoint_reshape import reshape_checkpoint
    from lmscale.train.layout_slices import Sizes

    source, start = resolve_checkpoint(checkpoint), time.perf_counter()
    if zero_stage is None:
        saved = int(read_manifest(source)["layout"]["zero_stage"])
        zero_stage = min(saved, 1) if pp_size > 1 else saved
    done = reshape_checkpoint(
        source, out, Sizes(tp_size, pp_size, dp_size, zero_stage), lambda line: typer.echo(line, err=True)
    )
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    typer.echo(
        f"{out}: {done.num_files} files, {done.num_bytes / 1e6:,.1f} MB in {seconds:.1f} s; the process took "
        f"{peak / 1e6:,.0f} MB of memory at most, the largest tensor {done.largest_tensor_bytes / 1e6:,.1f} MB of it"
    )
