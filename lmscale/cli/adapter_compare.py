"""`lmscale adapter compare`: several methods on one task, trained one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.errors import ConfigError

if TYPE_CHECKING:
    from lmscale.launcher.method_runs import MethodRun
    from lmscale.report.adaptations import Comparison


def compare(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="A run with a task.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys to override, in all runs.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help='A method, as in "lora", "lora,optim.lr=1e-3" or "thin=lora,adapt.rank=1"; give several.'),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, joined by commas.")] = "1,2,3",
    output: Annotated[Path, typer.Option(help="Directory for the runs and the comparison.")] = Path("comparison"),
    devices: Annotated[int | None, typer.Option(help="Ranks of each run. Left out: all CUDA devices, or 1.")] = None,
) -> int:
    """Train a task by several methods, each with several seeds, and put them side by side.

    A run that has its results already is not trained again. Writes comparison.json, comparison.md and comparison.png:
    the deciding metric on each set, in and out of domain, its difference from full fine-tuning out of domain, parameters
    trained, memory, time.
    """
    from lmscale.launcher.compose import compose, place
    from lmscale.launcher.method_runs import method_runs
    from lmscale.launcher.start import resolved_config_path, start
    from lmscale.launcher.validate import validate_run
    from lmscale.report.adaptations import compare as put_side_by_side
    from lmscale.report.adaptations import read_results

    if not method:
        raise ConfigError("is missing", field="--method", remedy="name the methods to compare, as in --method lora")
    runs = method_runs(run, method, _seeds(seeds), output, overrides or ())
    placement = place(None, devices, None)
    # All are checked before the first is trained.
    plans = [(each, validate_run(each.config, placement.num_ranks)) for each in runs if not _results(each).is_file()]
    for number, (each, plan) in enumerate(plans, start=1):
        typer.echo(f"[{number}/{len(plans)}] {each.name}, seed {each.seed}", err=True)
        outcome = start(plan, compose(plan, placement, resolved_config_path(plan)))
        if outcome.status:
            sys.stderr.write(f"error: {outcome.error or each.name + ' did not end well'}\n")
            return outcome.status
    comparison = put_side_by_side((each.name, read_results(_results(each))) for each in runs)
    _show(comparison, output)
    return 0


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise ConfigError("must be different whole numbers", field="--seeds", value=text, remedy="as in 1,2,3")
    return seeds


def _results(each: MethodRun) -> Path:
    return Path(each.config.output_dir) / "results.json"


def _show(comparison: Comparison, output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from lmscale.monitor.atomic import replaced
    from lmscale.report import adaptations

    columns, rows = adaptations.table(comparison)
    shown = Table(*columns, title=f"{comparison.metric}, mean ± standard deviation over seeds")
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    with replaced(output / "comparison.json") as file:
        file.write((json.dumps(comparison.to_json(), indent=1) + "\n").encode())
    with replaced(output / "comparison.md") as file:
        file.write(adaptations.markdown(comparison).encode())
    adaptations.plot(comparison, output / "comparison.png")
    typer.echo(f"{output}/comparison.json, .md, .png")
