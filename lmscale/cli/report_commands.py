"""`lmscale report` and `lmscale compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's directory: its output_dir.")],
    output: Annotated[Path | None, typer.Option(help="The page. Left out: report.html in the run's directory.")] = None,
) -> int:
    """Write one HTML page on a run, without anything from a network: curves, held-out losses, plan, environment."""
    from lmscale.report.page import write_page
    from lmscale.report.run_files import read_run
    from lmscale.report.run_report import run_report

    found = read_run(run)
    path = run / "report.html" if output is None else output
    write_page(path, run_report(found))
    typer.echo(f"wrote {path}: {path.stat().st_size / 1e3:,.0f} kB")
    return 0


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="A run's directory.")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another's.")],
    output: Annotated[Path | None, typer.Option(help="Write a page too, with the curves laid over each other.")] = None,
    tolerance: Annotated[
        float, typer.Option(help="Relative difference beyond which values count as different.")
    ] = 1e-3,
) -> int:
    """Say where two runs first differ: config, environment, and each metric's first step, exactly and beyond a tolerance.

    The methods of a task are compared by `lmscale adapter compare`.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    from lmscale.errors import ConfigError
    from lmscale.report.compare_page import compare_page, names_of, tables, verdict
    from lmscale.report.page import write_page
    from lmscale.report.run_compare import compare_runs
    from lmscale.report.run_files import read_run

    if not 0 <= tolerance < 1:
        raise ConfigError("must be 0 or more, and below 1", field="--tolerance", value=tolerance)
    one, other = read_run(run_a), read_run(run_b)
    found = compare_runs(one, other, tolerance)
    console = Console(highlight=False, markup=False)
    for title, columns, rows in tables(found, names_of(one, other)):
        first, *others = columns
        folded = [Column(name, overflow="fold") for name in others]  # a pipe has 80 columns, and values are longer
        shown = Table(Column(first, no_wrap=True), *folded, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
    for line in verdict(found):
        console.print(line, soft_wrap=True)
    if output is not None:
        write_page(output, compare_page(one, other, found))
        typer.echo(f"wrote {output}: {output.stat().st_size / 1e3:,.0f} kB")
    return 0
