"""Break runs in every way that docs/reliability.md lists, and check what it promises: `python tools/drill.py`.

A run of two ranks (ZeRO 1, dropout on, processes on this machine over gloo) has a checkpoint at step 2, and is broken on its
way to step 6. Then the same command is given again. What must hold: no checkpoint that was whole is lost, the start says what
it passes over, and the run ends with the losses, weights and moments of the run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
sites: Any = importlib.import_module("drill_site")
faults: Any = importlib.import_module("drill_faults")


def run_all(site: Any, drills: list[Any]) -> Iterator[tuple[Any, str, bool]]:
    """Run drills, and yield each with what happened and whether the promise held (a drill that cannot run here: None)."""
    for drill in drills:
        try:
            yield drill, drill.run(site), True
        except sites.NotHere as reason:
            yield drill, f"not run: {reason}", None
        except Exception as error:  # a drill that fails must not hide those after it
            yield drill, f"{type(error).__name__}: {error}".splitlines()[0], False


def main() -> int:
    """Run the drills that are asked for, print the table, and return 1 where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="TEXT", help="run drills whose name holds this")
    parser.add_argument("--list", action="store_true", help="name the drills, run none")
    parser.add_argument(
        "--random-kills", metavar="N", type=int, default=0, help="besides, kill a run N times at random"
    )
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="write the table there")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="lmscale-drill-") as directory:
        site = sites.Site(Path(directory))
        with console.status("training the run that nothing happens to"):
            site.prepare()
        drills = [drill for drill in faults.drills(site) if not options.only or options.only in drill.name]
        if options.random_kills:
            drills.append(faults.random_kills(options.random_kills))
        if options.list:
            for drill in drills:
                console.print(drill.name, highlight=False, markup=False)
            return 0
        rows = []
        start = time.monotonic()
        with Progress(console=console, transient=True) as bar:
            task = bar.add_task("drills", total=len(drills))
            for drill, outcome, held in run_all(site, drills):
                rows.append((drill, outcome, held))
                bar.update(task, advance=1, description=drill.name[:60])
                if held is False:
                    console.print(f"[red]broken[/] {drill.name}: {outcome}", highlight=False)
    _print_table(console, rows, time.monotonic() - start)
    if options.markdown:
        options.markdown.write_text(_markdown(rows, time.monotonic() - start))
    return int(any(held is False for _, _, held in rows))


def _print_table(console: Console, rows: list[tuple[Any, str, bool]], seconds: float) -> None:
    table = Table("fault", "what happened", "promise")
    states = {True: "[green]kept[/]", False: "[red]broken[/]", None: "[yellow]not run[/]"}
    for drill, outcome, held in rows:
        table.add_row(drill.name, outcome, states[held])
    console.print(table)
    kept = sum(held is True for _, _, held in rows)
    console.print(f"{kept} of {len(rows)} promises kept, in {seconds:.0f} s")


def _markdown(rows: list[tuple[Any, str, bool]], seconds: float) -> str:
    states = {True: "kept", False: "**broken**", None: "not run"}
    kept = sum(held is True for _, _, held in rows)
    lines = [
        "# Drills",
        "What `python tools/drill.py` broke, and what became of it. It writes this page with `--markdown docs/drills.md`; the",
        "test suite runs a cover of the same drills, and all of them as slow tests (`tests/tools/test_drill.py`).",
        "",
        f"{kept} of {len(rows)} promises were kept, in {seconds:,.0f} s: two ranks (ZeRO 1, dropout, fp32) over gloo on a CPU.",
        '"The end" is the losses of all steps, all weights and all moments.',
        "",
        "| fault | promise | what happened | |",
        "|---|---|---|---|",
    ]
    lines += [f"| {drill.name} | {drill.promise} | {outcome} | {states[held]} |" for drill, outcome, held in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
