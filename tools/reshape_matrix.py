"""Save on every layout, resume on every layout, compare: `python tools/reshape_matrix.py`.

Each layout trains a small model for 15 steps in fp32 without a stop and saves after the fifth. Then each layout loads each
checkpoint: all parameters and moments are compared with the saved ones, bit for bit, and the ten losses that follow with
those of the layout's own run that did not stop. Ranks are processes on this machine, over gloo.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table

from lmscale.config.layouts import broken_rule
from lmscale.data.manifest import Manifest
from lmscale.data.writer import CorpusWriter
from lmscale.parallel.local_ranks import RankFailure, RankPool
from lmscale.verify.layouts import Candidate, parse_layouts

sys.path.insert(0, str(Path(__file__).parent))
trials: Any = importlib.import_module("reshape_trials")

LIMIT = 1.0e-5
"""Relative, of losses in fp32: sums in another order."""
SIZES = {
    "one": {},
    "tp2": {"tp_size": 2},
    "pp2": {"pp_size": 2, "is_pipeline": True},
    "dp2": {"dp_size": 2},
    "tp2-pp2": {"tp_size": 2, "pp_size": 2, "is_pipeline": True},
    "tp2-dp2": {"tp_size": 2, "dp_size": 2},
    "pp2-dp2": {"pp_size": 2, "dp_size": 2, "is_pipeline": True},
    "pp1": {"pp_size": 1, "is_pipeline": True},
}
"""Sizes of the axes; pp1 is the pipeline engine on one stage."""
LINE_EVERY = 24
"""Pairs to a line of progress, where stderr is no terminal."""
CHUNK = 8
"""Checkpoints that ranks load before they begin anew."""


@dataclass
class Cell:
    """What became of one layout's checkpoint on another layout."""

    source: str
    target: str
    loss_difference: float
    is_exact: bool
    load_s: float
    peak_bytes: int
    reason: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the state is the saved one, and the losses those of the run that did not stop."""
        return self.is_exact and self.loss_difference <= LIMIT


@dataclass
class Matrix:
    """Layouts, a directory to work in, and the ranks that do it; one pool lives at a time.

    Attributes:
        shape: keys of the model, over those of `reshape_trials.run_keys`.
    """

    layouts: Sequence[Candidate]
    directory: Path
    optimizer: str = "adamw"
    shape: dict[str, Any] = field(default_factory=dict)
    references: dict[str, list[float]] = field(default_factory=dict)
    states: dict[str, Any] = field(default_factory=dict)
    run_ranks: Callable[..., list[Any]] | None = None
    """Runs a function on some ranks; left out, on a pool of its own."""
    _pool: RankPool | None = None

    def train_all(self) -> Iterator[Candidate]:
        """Train every layout without a stop, saving on the way."""
        corpus = str(self.directory / "corpus")
        if not Path(f"{corpus}.idx").exists():
            write_corpus(corpus, self.shape.get("vocab_size", 500))
        for layout in sorted(self.layouts, key=lambda layout: layout.num_ranks):
            keys = self._keys(layout)
            losses = self._run(layout, trials.train_and_save, keys, layout.is_pipeline)
            self.references[layout.name] = losses[-1]  # of the last stage
            self.states[layout.name] = trials.write_state(self._checkpoint(layout), self._state(layout))
            yield layout

    def cells(self, pairs: Sequence[tuple[Candidate, Candidate]]) -> Iterator[Cell]:
        """Resume the checkpoint of each source on its target; pairs are walked target by target."""
        ordered = sorted(pairs, key=lambda pair: (pair[1].num_ranks, pair[1].name))
        for target, group in itertools.groupby(ordered, key=lambda pair: pair[1]):
            sources = [source for source, _ in group]
            for start in range(0, len(sources), CHUNK):
                yield from self._resume(target, sources[start : start + CHUNK])

    def _resume(self, target: Candidate, sources: Sequence[Candidate]) -> list[Cell]:
        files = [(str(self._checkpoint(source)), str(self._state(source))) for source in sources]
        try:
            ranks = self._run(target, trials.resume_all, self._keys(target), target.is_pipeline, files)
        except RankFailure as failure:
            return [Cell(s.name, target.name, math.nan, False, math.nan, 0, failure.reason) for s in sources]
        found = []
        for source, *results in zip(sources, *ranks, strict=True):
            missing = trials.missing_of(self.states[source.name], results)
            differing = next((result.difference for result in results if result.difference), "")
            reason = f"{differing} differs" if differing else f"{missing} is not whole" if missing else ""
            reference = self.references[target.name][trials.BEFORE :]
            found.append(
                Cell(
                    source.name,
                    target.name,
                    max(abs(a - b) / abs(b) for a, b in zip(results[-1].losses, reference, strict=True)),
                    not reason,
                    max(result.load_s for result in results),
                    max(result.peak_bytes for result in results),
                    reason,
                )
            )
        return found

    def _run(self, layout: Candidate, function: Any, *arguments: Any) -> list[Any]:
        if self.run_ranks is not None:
            return self.run_ranks(layout.num_ranks, function, *arguments)
        if self._pool is None or self._pool.is_closed or self._pool.world_size != layout.num_ranks:
            self.close()
            self._pool = RankPool(layout.num_ranks)
        return self._pool.run(function, *arguments)

    def close(self) -> None:
        """End the ranks."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _keys(self, layout: Candidate) -> dict[str, Any]:
        corpus = str(self.directory / "corpus")
        return dict(trials.run_keys(corpus, str(self.directory / layout.name), layout, self.shape, self.optimizer))

    def _checkpoint(self, layout: Candidate) -> Path:
        return self.directory / layout.name / "checkpoints" / f"step-{trials.BEFORE:08d}"

    def _state(self, layout: Candidate) -> Path:
        return self.directory / f"{layout.name}.npz"


def all_layouts() -> list[Candidate]:
    """List the sizes by the ZeRO stages that each can be trained with."""
    found = [Candidate(**sizes, zero_stage=stage) for sizes in SIZES.values() for stage in range(4)]
    return [layout for layout in found if broken_rule(layout.legality("fp32")) is None]


def sizes_of(name: str) -> str:
    """Return the sizes in a layout's name, without its ZeRO stage."""
    return name.rpartition("-")[0] or "one"


def write_corpus(prefix: str, vocab_size: int, num_tokens: int = 12_000) -> None:
    """Write documents of random tokens, small ids the most frequent."""
    rng = np.random.default_rng(7)
    with CorpusWriter(prefix, np.uint16) as writer:
        while writer.num_tokens < num_tokens:
            length = int(rng.integers(1, 200))
            tokens = np.append(1 + ((min(vocab_size, 65_000) - 1) * rng.random(length - 1) ** 3).astype(np.uint16), 0)
            writer.append(tokens.astype(np.uint16).tobytes(), np.array([length], np.int32))
        counts: dict[str, Any] = {"documents": writer.num_documents, "tokens": writer.num_tokens}
        writer.finish(
            lambda digest, size: Manifest("", vocab_size, None, skipped={}, idx_sha256=digest, bin_bytes=size, **counts)
        )


def worst(cells: Sequence[Cell]) -> dict[tuple[str, str], Cell]:
    """Take, of all ZeRO stages of two sizes, the pair that did worst."""
    found: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        key = sizes_of(cell.source), sizes_of(cell.target)
        if key not in found or _badness(cell) > _badness(found[key]):
            found[key] = cell
    return found


def _badness(cell: Cell) -> tuple[bool, float]:
    return not cell.is_good, math.inf if math.isnan(cell.loss_difference) else cell.loss_difference


def table_rows(cells: Sequence[Cell]) -> tuple[list[str], list[list[Cell | None]]]:
    """Arrange the worst cells: sizes, and for each source a row by target."""
    by_sizes = worst(cells)
    sizes = [name for name in SIZES if any(name in key for key in by_sizes)]
    return sizes, [[by_sizes.get((source, target)) for target in sizes] for source in sizes]


def show(cells: Sequence[Cell], console: Console) -> None:
    """Print the table and what failed."""
    sizes, rows = table_rows(cells)
    columns = (Column(name, no_wrap=True) for name in ("saved on \\ resumed on", *sizes))
    table = Table(*columns, title="largest relative difference of ten losses, over ZeRO stages")
    for source, row in zip(sizes, rows, strict=True):
        table.add_row(source, *(_colored(cell) for cell in row))
    console.print(table)
    for cell in cells:
        if not cell.is_good:
            console.print(f"{cell.source} -> {cell.target}: {cell.reason or cell.loss_difference}", style="red")
    for line in summary(cells):
        console.print(line, markup=False)


def _colored(cell: Cell | None) -> str:
    if cell is None:
        return ""
    color = "green" if cell.is_good else "bold red"
    return f"[{color}]{cell.loss_difference:.1e}[/]"


def summary(cells: Sequence[Cell]) -> list[str]:
    """Say in lines what the cells come to."""
    good = [cell for cell in cells if cell.is_good]
    times = sorted(cell.load_s for cell in good) or [math.nan]
    peaks = sorted(cell.peak_bytes for cell in good) or [0]
    return [
        f"{len(good)} of {len(cells)} pairs: state bit for bit the saved one, losses within {LIMIT:g}",
        f"loading took {times[len(times) // 2]:.3f} s, {times[-1]:.3f} s at most; "
        f"reading took, besides the state, on any rank {peaks[-1] / 2**20:.1f} MiB at most, "
        f"in the median {peaks[len(peaks) // 2] / 2**20:.1f} MiB",
    ]


def markdown(cells: Sequence[Cell]) -> str:
    """Write the table as Markdown."""
    sizes, rows = table_rows(cells)
    lines = ["| saved on \\ resumed on | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for source, row in zip(sizes, rows, strict=True):
        words = ("" if cell is None else f"{cell.loss_difference:.1e}" for cell in row)
        lines.append(f"| {source} | " + " | ".join(words) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the matrix and return 1 where a pair fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", help="names as of `lmscale verify`, separated by commas; left out, all 24")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=500)
    parser.add_argument("--before", type=int, default=trials.BEFORE, help="steps up to the save")
    parser.add_argument("--after", type=int, default=trials.AFTER, help="steps from the load on")
    parser.add_argument("--json", metavar="FILE", help="write every pair here")
    parser.add_argument("--markdown", metavar="FILE", help="write the table here")
    options = parser.parse_args()
    trials.BEFORE, trials.AFTER = options.before, options.after  # before any rank is forked
    layouts = all_layouts() if options.layouts is None else parse_layouts(options.layouts, 4, "fp32")
    console, start = Console(highlight=False, soft_wrap=True), time.monotonic()
    if not console.is_terminal:
        console.width = 140
    shape = {"hidden_size": options.hidden_size, "vocab_size": options.vocab_size}
    with tempfile.TemporaryDirectory(prefix="reshape-") as directory, _bar() as bar:
        matrix = Matrix(layouts, Path(directory), options.optimizer, shape)
        total = len(layouts) ** 2 + len(layouts)
        task, cells = bar.add_task("train", total=total), []

        def advance(words: str) -> None:
            bar.update(task, advance=1, description=words, refresh=True)
            done = int(bar.tasks[0].completed)
            if not bar.console.is_terminal and done % LINE_EVERY == 0:
                bar.console.print(f"{done} of {total}: {words}, {time.monotonic() - start:.0f} s")

        try:
            for layout in matrix.train_all():
                advance(f"trained {layout.name}")
            for cell in matrix.cells(list(itertools.product(layouts, layouts))):
                cells.append(cell)
                advance(f"{cell.source} -> {cell.target}")
        finally:
            matrix.close()
    show(cells, console)
    console.print(f"{len(layouts)} layouts, {options.optimizer}, {time.monotonic() - start:.0f} s")
    if options.json:
        rows = [{**vars(cell), "is_good": cell.is_good} for cell in cells]
        Path(options.json).write_text(json.dumps({"limit": LIMIT, "pairs": rows}, indent=1) + "\n")
    if options.markdown:
        Path(options.markdown).write_text(markdown(cells) + "\n")
    return 0 if all(cell.is_good for cell in cells) else 1


def _bar() -> Progress:
    # No thread of rich's: ranks are forked on the way, and a lock that it holds would stay locked in them.
    return Progress(console=Console(stderr=True), auto_refresh=False, transient=True)


if __name__ == "__main__":
    sys.exit(main())
