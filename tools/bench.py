"""Measure speed and memory against peers, as ratios in one run: `make bench`. Writes docs/benchmarks.md.

Run it on a quiet machine. `--only step ranks` measures a part, prints it and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from bench_sheet import Sheet
from rich.console import Console

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
PACKAGES = ("torch", "deepspeed", "megatron-core", "transformers", "peft", "sentencepiece")
SCRIPTS = {"data": "bench_data.py", "objectives": "bench_objectives.py"}
"""Parts that print their own tables."""
START_RUNS = 5
GOAL_OF_HELP_S, GOAL_OF_REFUSAL_S = 0.3, 1.0
WRONG_RUN = """
model: {num_layers: 2, hidden_size: 66, num_attention_heads: 4, vocab_size: 512}
data: {train: [{prefix: unread}], seq_length: 32}
batch: {micro_batch_size: 1, global_batch_size: 1}
optim: {lr: 1.0e-3}
train: {train_tokens: 1000}
output_dir: unwritten
"""
METHOD = """\
`make bench` writes this page: every ratio comes from one run, on one machine, contenders in turn.

Each contender trains in a process of its own and the steps are timed from outside, so that none profits from what
another sets: lmscale has glibc keep freed memory on a CPU, the others run as they come. All use torch's fused AdamW with
the same settings, no decay on biases and norms, the gradient norm clipped at 1.0. In bf16 all compute forward and
backward with bf16 weights and update fp32 master weights: lmscale's by DeepSpeed's ZeRO 1, the peers' by a copy of each
parameter (`model.bfloat16()`, gradients widened, AdamW on the masters, the result copied back).
"""
SLOW_BF16 = """
This CPU has no bf16 instructions, and torch's bf16 kernels for such CPUs are an order of magnitude slower than its fp32
ones. lmscale widens the operands of each multiplication there, the peers do not: hence their distance in bf16. On a CPU
with AVX-512 or AMX, and on a GPU, lmscale calls the same kernels as they do.
"""


def start() -> Iterator[Sheet]:
    """Time `lmscale --help` and the refusal of a wrong config."""
    program = str(Path(sys.executable).parent / "lmscale")
    sheet = Sheet(
        "Start",
        ["", "s, median", "goal"],
        note=f"{START_RUNS} runs of a fresh process; the config's heads do not divide.",
    )
    with tempfile.TemporaryDirectory() as directory:
        wrong = Path(directory) / "wrong.yaml"
        wrong.write_text(WRONG_RUN)
        for arguments, status, goal in (
            (["--help"], 0, GOAL_OF_HELP_S),
            (["train", str(wrong)], 2, GOAL_OF_REFUSAL_S),
        ):
            taken = []
            for _ in range(START_RUNS):
                started = time.perf_counter()
                done = subprocess.run([program, *arguments], capture_output=True, cwd=directory, check=False)
                taken.append(time.perf_counter() - started)
                if done.returncode != status:
                    raise SystemExit(f"lmscale {arguments[0]}: status {done.returncode}\n{done.stderr.decode()}")
            shown = "lmscale --help" if status == 0 else "lmscale train, a wrong config refused"
            sheet.row(shown, f"{statistics.median(taken):.2f}", f"<= {goal}")
    yield sheet


def printed_by(script: str) -> str:
    """Run a script of tools/ in a process of its own and return what it prints."""
    environment = {**os.environ, "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / script)], stdout=subprocess.PIPE, env=environment, text=True
    )
    if done.returncode:
        raise SystemExit(done.returncode)
    return "\n".join(line.rstrip() for line in done.stdout.splitlines())


def machine() -> list[str]:
    """Describe where the figures come from."""
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        f"{model}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}; Python {platform.python_version()}",
        versions,
    ]
    if torch.cuda.is_available():
        lines.append(f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    return lines


def main() -> int:
    """Measure, print, write the page."""
    parts = ("step", "ranks", "memory", "wait", "adaptation", "checkpoints", *SCRIPTS, "start", "cluster", "gpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="measure these, and write nothing")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of a race, in which all take turns")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of the libraries that are measured
    import bench_adaptation
    import bench_checkpoint
    import bench_cluster
    import bench_train
    import torch
    from cluster_network import missing_for_a_cluster

    from lmscale.parallel.device import multiplies_slowly

    console = Console()
    measured: dict[str, Callable[[], Iterable[Sheet]]] = {
        "step": lambda: bench_train.one_process(options.seconds),
        "ranks": lambda: bench_train.two_ranks(options.seconds),
        "memory": bench_train.zero_memory,
        "wait": bench_train.data_wait,
        "adaptation": lambda: bench_adaptation.adaptation(options.seconds / 2),
        "checkpoints": bench_checkpoint.checkpoints,
        "start": start,
    }
    lacking = missing_for_a_cluster()
    if lacking is None:
        measured["cluster"] = bench_cluster.two_hosts
    if torch.cuda.is_available():
        measured["gpu"] = lambda: bench_train.gpu(options.seconds / 4)
    for line in machine():
        console.print(line)
    sections = [METHOD]
    if multiplies_slowly(torch.empty(0, dtype=torch.bfloat16)):
        sections[0] += SLOW_BF16
    for part in parts:
        if part not in options.only:
            continue
        if part in SCRIPTS:
            printed = printed_by(SCRIPTS[part])
            console.print(printed, highlight=False, markup=False)
            sections.append(f"## {part.capitalize()}\n\n```text\n{printed.strip()}\n```\n")
        elif part in measured:
            for sheet in measured[part]():
                console.print(sheet.rich())
                sections.append(sheet.markdown())
        elif part == "cluster":
            console.print(f"cluster: not measured, it {lacking}")
            sections.append(f"## Two hosts\n\nNot measured: a cluster of namespaces {lacking}.\n")
        else:
            sections.append(
                "## GPU\n\nNot measured: no CUDA device was at hand. `make bench` measures it where one is.\n"
            )
    if tuple(options.only) == parts:
        head = "# Benchmarks\n\n" + "".join(f"- {line}\n" for line in machine())
        PAGE.write_text("\n".join([head, *sections]), encoding="utf-8")
        console.print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
