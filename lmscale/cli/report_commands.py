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
