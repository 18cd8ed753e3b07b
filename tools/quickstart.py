"""Do the main job once, on text that every machine with Python has: `make quickstart` runs this.

Text: the standard library's own sources, docstrings included, one document a file; one file in 25 is held out. Then the
commands that a user would type, each printed before it runs: tokenizer train, tokenize, train, generate, report. At the
end the held-out loss is set beside the entropy of a unigram model of the same tokens, and quickstart/report.md is written.
Everything stays under quickstart/.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from curves import plot_curves
from rich.console import Console
from rich.markup import escape
from unigram import unigram_entropy

ROOT = Path(__file__).resolve().parent.parent
HOME = Path("quickstart")
RUN_YAML = "launch/runs/quickstart.yaml"
RUN_DIR = HOME / "run"
PAGE = HOME / "report.html"
VALID_NAME = "stdlib"

VOCAB_SIZE = 4096
NUM_SHARDS = 8
HELD_OUT_ONE_IN = 25
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
"""Other people's packages, tests, and the tables of `encodings`, which are numbers rather than text."""

PROMPT = "def "
LARGEST_SHARE_OF_UNIGRAM = 0.75
"""The held-out loss must be this share of the unigram entropy or less: 25 % below."""

console = Console(highlight=False, soft_wrap=True)


@dataclass
class Quickstart:
    """What the steps have found so far."""

    figures: dict[str, str] = field(default_factory=dict)
    commands: list[tuple[str, float]] = field(default_factory=list)
    sample: str = ""

    def lmscale(self, *arguments: str, capture: bool = False) -> str:
        """Print an `lmscale` command, run it, and end with its status if it fails."""
        shown = shlex.join(["lmscale", *arguments])
        console.print(f"\n[bold cyan]$ .venv/bin/{escape(shown)}[/]")
        started = time.monotonic()
        done = subprocess.run(
            [str(Path(sys.executable).parent / "lmscale"), *arguments],
            stdout=subprocess.PIPE if capture else None,
            text=True,
            check=False,
        )
        if done.returncode:
            console.print(f"[red]that command ended with status {done.returncode}[/]")
            raise SystemExit(done.returncode)
        self.commands.append((shown, time.monotonic() - started))
        return done.stdout or ""


def main() -> int:
    """Run every step; the exit status says whether the model learned."""
    started = time.monotonic()
    work = Quickstart()
    _clear()
    write_corpus(work)
    tokenizer = str(HOME / "tokenizer")
    text = HOME / "text"
    train, valid = str(text / "train-*.jsonl"), str(text / "valid.jsonl")
    # fmt: off
    work.lmscale("tokenizer", "train", "--input", train, "--vocab-size", str(VOCAB_SIZE), "--model-type", "bpe",
                 "--output", tokenizer)
    # fmt: on
    for part, files in (("train", train), ("valid", valid)):
        work.lmscale("tokenize", "--input", files, "--tokenizer", tokenizer, "--output", str(HOME / part))
    work.lmscale("train", RUN_YAML, "--devices", str(_num_devices()))

    metrics = _read_metrics()
    held_out, unigram = (
        _last(metrics, f"valid/{VALID_NAME}/lm_loss"),
        unigram_entropy(HOME / "train", HOME / "valid", VOCAB_SIZE),
    )
    learned = held_out <= LARGEST_SHARE_OF_UNIGRAM * unigram
    checkpoint = max((RUN_DIR / "checkpoints").glob("step-*"))
    work.sample = work.lmscale(
        "generate", str(checkpoint), "--prompt", PROMPT, "--temperature", "0.8", "--seed", "1", capture=True
    )
    console.print(escape(work.sample))
    work.lmscale("report", str(RUN_DIR), "--output", str(PAGE))

    work.figures |= {
        "held-out loss": f"{held_out:.3f} nats per token",
        "unigram entropy of the corpus": f"{unigram:.3f} nats per token",
        "held-out loss / unigram entropy": f"{held_out / unigram:.2f} (at most {LARGEST_SHARE_OF_UNIGRAM} is asked)",
        "training tokens": f"{metrics[-1]['consumed_tokens']:,} in {metrics[-1]['step']:,} steps",
        "tokens per second": f"{_last(metrics, 'perf/tokens_per_second'):,.0f}",
        "time, all steps": f"{time.monotonic() - started:.0f} s",
    }
    report = write_report(work, metrics, unigram)
    console.rule()
    for name, value in work.figures.items():
        console.print(f"{name:34} [bold]{escape(value)}[/]")
    console.print(f"{'report':34} {report}")
    console.print(f"{'the run as a page':34} {PAGE}")
    console.print(f"{'TensorBoard':34} .venv/bin/tensorboard --logdir {RUN_DIR}/tensorboard")
    if not learned:
        console.print("[red]the held-out loss is not well below the unigram entropy: the model has not learned[/]")
    return 0 if learned else 1


def write_corpus(work: Quickstart) -> None:
    """Write the standard library's sources as JSON lines, one document a file, some of them held out.

    Which files are held out, and in what order the others stand, depends on their names alone.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    console.print(f"reading the sources of the standard library under {library}")
    parts: dict[str, list[str]] = {f"train-{shard:02d}": [] for shard in range(NUM_SHARDS)} | {"valid": []}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if SKIPPED_DIRECTORIES & set(name.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if not source.strip():
            continue
        number = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8])
        part = "valid" if number % HELD_OUT_ONE_IN == 0 else f"train-{number // HELD_OUT_ONE_IN % NUM_SHARDS:02d}"
        parts[part].append(json.dumps({"text": source, "file": name.as_posix()}))
    (HOME / "text").mkdir(parents=True)
    for part, documents in parts.items():
        (HOME / "text" / f"{part}.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")
    num_documents = sum(map(len, parts.values()))
    num_bytes = sum(path.stat().st_size for path in (HOME / "text").iterdir())
    work.figures["corpus"] = f"{num_documents} files, {num_bytes / 1e6:.1f} MB; {len(parts['valid'])} files held out"
    console.print(work.figures["corpus"])


def write_report(work: Quickstart, metrics: list[dict[str, Any]], unigram: float) -> Path:
    """Write quickstart/report.md and the loss curve beside it."""
    tags = ("train/lm_loss", f"valid/{VALID_NAME}/lm_loss")
    curves = {tag: [(line["step"], line[tag]) for line in metrics if tag in line] for tag in tags}
    plot_curves(HOME / "loss.svg", curves, {"unigram": unigram})
    lines = ["# Quick start", "", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in work.figures.items()]
    lines += ["", "![Loss by step](loss.svg)", "", "## Sample", "", "```", work.sample.strip(), "```", ""]
    lines += ["## Commands", "", "| command | seconds |", "|---|---|"]
    lines += [f"| `.venv/bin/{command}` | {seconds:.0f} |" for command, seconds in work.commands]
    path = HOME / "report.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _read_metrics() -> list[dict[str, Any]]:
    with (RUN_DIR / "metrics.jsonl").open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _last(metrics: list[dict[str, Any]], key: str) -> float:
    return float(next(line[key] for line in reversed(metrics) if key in line))


def _num_devices() -> int:
    """Two ranks on CPU, where they share the cores; on GPUs, one rank each."""
    import torch

    return min(2, torch.cuda.device_count()) or 2


def _clear() -> None:
    """Remove what an earlier quick start left, and nothing else."""
    for name in ("text", "tokenizer", "run"):
        shutil.rmtree(HOME / name, ignore_errors=True)
    for pattern in ("train.*", "valid.*", "report.md", PAGE.name, "loss.svg"):
        for path in HOME.glob(pattern):
            path.unlink()


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
