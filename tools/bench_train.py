"""Training steps: one process against peers, two data-parallel ranks against one process, ZeRO's memory, a GPU."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_race import Contender, collect, median_ratio, race
from bench_sheet import Sheet

from lmscale.config.io import parse_run
from lmscale.config.model import ModelConfig
from lmscale.data.index_file import dtype_for
from lmscale.data.manifest import Manifest
from lmscale.data.writer import CorpusWriter
from lmscale.monitor.metrics import PERF_DATA_WAIT_FRACTION, PERF_STEP_TIME_S
from lmscale.plan.devices import peak_flops_per_second
from lmscale.plan.flops import model_flops_per_token
from lmscale.plan.memory import StateBytes, zero_bytes
from lmscale.plan.params import parameter_table

SMALL = ModelConfig(num_layers=6, hidden_size=384, num_attention_heads=6, vocab_size=8192, max_position_embeddings=1024)
SEQ_LENGTH, BATCH = 256, 8
GOAL_OF_PEER, GOAL_OF_RANKS, GOAL_OF_MEMORY, GOAL_OF_MFU = 1.05, 0.9, 0.02, 0.5
GPU_SEQ_LENGTH = 2048
GPU_MODELS = {"gpt3-350m": (16, 8, 4, 2, 1), "gpt3-1.3b": (8, 4, 2, 1)}
"""Preset to micro batch sizes, the first that fits; each contender takes the largest that all of them can."""
OUR_NAME = "lmscale"
GOAL_OF_WAIT = 0.01
WAIT_STEPS, WAIT_DOCUMENTS = 10, 4000


# --- what runs in the ranks ---


def steps_of(
    kind: str, model: ModelConfig, precision: str, stage: int, seq_length: int, batch: int, compile: bool = False
) -> Callable[[], Any]:
    """Build a trainer on this rank and return its next step, on a share of the batch of random tokens."""
    import bench_peers
    import torch
    import torch.distributed as dist

    from lmscale.parallel.device import local_device

    device, ranks = local_device(), dist.get_world_size()
    if kind == "lmscale":
        from lmscale.parallel.topology import init_topology

        config = bench_peers.lmscale_config(model, precision, stage, seq_length, batch, batch // ranks, compile)
        trainer: bench_peers.Trainer = bench_peers.lmscale_trainer(config, init_topology(1, 1))
    elif kind == "hf":
        trainer = bench_peers.hf_trainer(model, precision)
    else:
        trainer = bench_peers.plain_trainer(model, precision, device, compile)
    generator = torch.Generator().manual_seed(dist.get_rank())
    windows = torch.randint(0, model.vocab_size, (batch // ranks, seq_length + 1), generator=generator)
    tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    if kind != "lmscale":
        tokens, labels = tokens.to(device), labels.to(device)
    return lambda: trainer.step(tokens, labels)


def states_of(cases: list[tuple[str, int]]) -> list[tuple[StateBytes, StateBytes]]:
    """Measure this rank's training state for each precision and ZeRO stage."""
    return [state_of(precision, stage) for precision, stage in cases]


def state_of(precision: str, stage: int) -> tuple[StateBytes, StateBytes]:
    """Train a step of two micro batches on this rank; return the bytes between the two and those after the step."""
    import bench_peers
    import torch
    import torch.distributed as dist

    from lmscale.parallel.topology import init_topology
    from lmscale.train.memory import state_bytes

    config = bench_peers.lmscale_config(SMALL, precision, stage, 16, 2 * dist.get_world_size(), 1)
    trainer = bench_peers.lmscale_trainer(config, init_topology(1, 1))
    engine = trainer.engine
    looks: list[StateBytes] = []
    step = engine.deepspeed.step

    def step_and_look() -> None:
        step()
        looks.append(state_bytes(engine))

    engine.deepspeed.step = step_and_look
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    trainer.step(tokens, tokens)
    return looks[0], looks[1]


# --- what is measured ---


def one_process(seconds: float) -> Iterator[Sheet]:
    """Race lmscale's engine against its peers on one process of two threads."""
    for precision, stage in (("fp32", 0), ("bf16", 1)):
        size = (SMALL, precision, stage, SEQ_LENGTH, BATCH)
        names = {
            OUR_NAME: ("lmscale", *size),
            f"{OUR_NAME}, train.compile": ("lmscale", *size, True),
            "plain PyTorch GPT": ("plain", *size),
            "transformers GPT-2": ("hf", *size),
        }
        peers = ["plain PyTorch GPT", "transformers GPT-2"]
        if precision != "fp32":
            names["plain PyTorch GPT in fp32"] = ("plain", SMALL, "fp32", 0, SEQ_LENGTH, BATCH)
        times = race([Contender(name, steps_of, arguments) for name, arguments in names.items()], seconds)
        faster = min(peers, key=lambda name: statistics.median(times[name]))
        sheet = Sheet(
            f"Training step, one process of two threads, {precision}, ZeRO {stage}",
            ["", "ms, median", f"of {faster}", "goal"],
            note=f"6 layers, 384 wide, 6 heads, vocabulary 8,192, {BATCH} x {SEQ_LENGTH} tokens; AdamW, clipping 1.0; "
            f"{len(times[OUR_NAME])} rounds, the median of the rounds' ratios.",
        )
        for name, taken in times.items():
            goal = f"<= {GOAL_OF_PEER}" if name == OUR_NAME else ""
            sheet.row(name, f"{1e3 * statistics.median(taken):,.0f}", f"{median_ratio(taken, times[faster]):.3f}", goal)
        yield sheet


def two_ranks(seconds: float) -> Iterator[Sheet]:
    """Race two data-parallel ranks of one thread against one process of two threads, on the same global batch."""
    size = (SEQ_LENGTH, BATCH)
    one = "one process, two threads, ZeRO 0"
    contenders = [Contender(one, steps_of, ("lmscale", SMALL, "fp32", 0, *size))]
    contenders += [
        Contender(f"two ranks, ZeRO {stage}", steps_of, ("lmscale", SMALL, "fp32", stage, *size), ranks=2, threads=1)
        for stage in range(4)
    ]
    times = race(contenders, seconds)
    sheet = Sheet(
        "Two data-parallel ranks of one thread against one process of two, fp32",
        ["", "tokens/s", f"of {one}", "goal"],
        note=f"The same model and global batch; {len(times[one])} rounds. gloo over the loopback.",
    )
    for name, taken in times.items():
        rate = BATCH * SEQ_LENGTH / statistics.median(taken)
        goal = f">= {GOAL_OF_RANKS}" if name == "two ranks, ZeRO 0" else ""
        sheet.row(name, f"{rate:,.0f}", f"{1 / median_ratio(taken, times[one]):.2f}", goal)
    yield sheet


def write_tokens(prefix: Path) -> None:
    """Write a corpus of random tokens for the small model."""
    tokens = np.random.default_rng(1).integers(0, SMALL.vocab_size, (WAIT_DOCUMENTS, SEQ_LENGTH))
    with CorpusWriter(prefix, dtype_for(SMALL.vocab_size)) as writer:
        writer.append(tokens.astype(np.uint16).tobytes(), np.full(WAIT_DOCUMENTS, SEQ_LENGTH, np.int32))
        writer.finish(
            lambda idx_sha256, size: Manifest(
                tokenizer_hash="none",
                vocab_size=SMALL.vocab_size,
                eos_id=None,
                documents=WAIT_DOCUMENTS,
                tokens=tokens.size,
                skipped={},
                idx_sha256=idx_sha256,
                bin_bytes=size,
            )
        )


def data_wait() -> Iterator[Sheet]:
    """Train a run of the small model as `lmscale train` does, one loader worker, and read how long it waits for data."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_tokens(directory / "tokens")
        keys = {
            "model": SMALL.model_dump(mode="json"),
            "data": {"train": [{"prefix": str(directory / "tokens")}], "seq_length": SEQ_LENGTH, "num_workers": 1},
            "batch": {"micro_batch_size": BATCH, "global_batch_size": BATCH},
            "optim": {"lr": 1.0e-4},
            "train": {"train_tokens": 10**9, "stop_at_step": 2 * WAIT_STEPS, "log_interval": WAIT_STEPS},
            "checkpoint": {"save_interval": 0},
            "monitor": {"tensorboard": False},
            "deepspeed": {"zero_optimization": {"stage": 0}},
            "output_dir": str(directory / "run"),
        }
        (directory / "run.yaml").write_text(json.dumps(keys))  # YAML reads JSON
        command = [sys.executable, "-m", "lmscale.pretrain", "--config", str(directory / "run.yaml")]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        lines = (directory / "run" / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    sheet = Sheet(
        "Waiting for data, one worker of the loader",
        ["", "ms a step", "waiting", "goal"],
        note=f"A run of the model above, {BATCH} x {SEQ_LENGTH} tokens; perf/data_wait_fraction of the {WAIT_STEPS} steps "
        f"after the first {WAIT_STEPS}.",
    )
    sheet.row(
        OUR_NAME,
        f"{1e3 * last[PERF_STEP_TIME_S]:,.0f}",
        f"{last[PERF_DATA_WAIT_FRACTION]:.3%}",
        f"< {GOAL_OF_WAIT:.0%}",
    )
    yield sheet


def zero_memory() -> Iterator[Sheet]:
    """Set the bytes that each of two ranks holds beside the formula's."""
    ranks = 2
    num_parameters = sum(parameter_table(SMALL, padded=True).values())
    sheet = Sheet(
        f"ZeRO: MiB of the training state on each of {ranks} ranks, {num_parameters:,} parameters",
        ["", "parameters", "gradients", "optimizer", "largest deviation", "goal"],
        note="Measured from the tensors that DeepSpeed holds: gradients between two micro batches, the rest after a step; "
        "in brackets the formula (`lmscale.plan.memory`). What deviates is the padding of flat buffers and, with ZeRO "
        "3, biases and norms, which stay whole on every rank. Beside it, ZeRO 3 always, and ZeRO 1 and 2 during a "
        "backward pass, hold a bucket of `reduce_bucket_size` elements (DeepSpeed's default: 500 million).",
    )
    cases = [("fp32", stage) for stage in range(4)] + [("bf16", stage) for stage in range(1, 4)]
    by_rank = collect(Contender(OUR_NAME, states_of, (cases,), ranks=ranks, threads=1))
    for (precision, stage), *looks in zip(cases, *by_rank, strict=True):
        formula = zero_bytes(num_parameters, ranks, stage, precision)
        cells, worst = [], 0.0
        for part in ("parameters", "gradients", "optimizer"):
            expected = getattr(formula, part)
            held = [getattr(between if part == "gradients" else after, part) for between, after in looks]
            furthest = max(held, key=lambda value, expected=expected: abs(value - expected))
            worst = max(worst, abs(furthest / expected - 1))
            cells.append(f"{furthest / 2**20:.1f} ({expected / 2**20:.1f})")
        sheet.row(f"{precision}, ZeRO {stage}", *cells, f"{100 * worst:.2f} %", f"<= {100 * GOAL_OF_MEMORY:.0f} %")
    yield sheet


def gpu(seconds: float) -> Iterator[Sheet]:
    """Time GPT-3's sizes on one GPU, each contender alone on it."""
    import torch

    device = torch.cuda.get_device_name()
    peak = peak_flops_per_second(device, "bf16")
    for name, micro_batches in GPU_MODELS.items():
        yield gpu_sheet(name, micro_batches, device, peak, seconds)


def gpu_sheet(
    preset: str,
    micro_batches: tuple[int, ...],
    device: str,
    peak: float | None,
    seconds: float,
    *,
    seq_length: int = GPU_SEQ_LENGTH,
    on_gpu: bool = True,
) -> Sheet:
    """Time one size; the largest of `micro_batches` at which every contender fits."""
    model = preset_model(preset)
    kinds = {
        OUR_NAME: ("lmscale", False),
        f"{OUR_NAME}, train.compile": ("lmscale", True),
        "plain PyTorch GPT": ("plain", False),
        "plain PyTorch GPT, torch.compile": ("plain", True),
    }
    batch, times = 0, {}
    for batch in micro_batches:
        try:
            for name, (kind, compile) in kinds.items():
                arguments = (kind, model, "bf16", 1, seq_length, batch, compile)
                times |= race([Contender(name, steps_of, arguments, on_gpu=on_gpu)], seconds)
            break
        except RuntimeError as error:
            if "out of memory" not in str(error) or batch == micro_batches[-1]:
                raise
    sheet = Sheet(
        f"{preset} on {device}: bf16, sequences of {seq_length:,}, micro batch {batch}",
        ["", "ms, median", "tokens/s", "MFU", "of the faster plain GPT", "goal"],
        note="One GPU, one micro batch a step, fused AdamW over fp32 master weights (lmscale: ZeRO 1), clipping 1.0. "
        "MFU counts the full attention square (`lmscale.plan.flops`).",
    )
    reference = min(statistics.median(taken) for name, taken in times.items() if not name.startswith(OUR_NAME))
    for name, taken in times.items():
        step = statistics.median(taken)
        rate = batch * seq_length / step
        mfu = f"{rate * model_flops_per_token(model, seq_length) / peak:.3f}" if peak else "unknown peak"
        goal = f">= {GOAL_OF_MFU}" if name.startswith(OUR_NAME) else ""
        sheet.row(name, f"{1e3 * step:,.1f}", f"{rate:,.0f}", mfu, f"{step / reference:.3f}", goal)
    return sheet


def preset_model(preset: str) -> ModelConfig:
    """Resolve a preset to a model, dropout off."""
    keys = {
        "model": {"preset": preset, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 1},
        "batch": {"micro_batch_size": 1, "global_batch_size": 1},
        "optim": {"lr": 1.0e-4},
        "train": {"train_tokens": 1},
        "output_dir": "unwritten",
    }
    return parse_run(keys).model
