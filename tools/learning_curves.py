"""Train every objective for a few minutes on two ranks, on real text, and write docs/learning.md with the curves.

Text: the docstrings of Python's standard library, a document a module, one module in ten held out; prose, so that it has
sentences. Everything else stays under learning/, which may be removed.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import yaml
from curves import plot_curves
from unigram import unigram_entropy

from lmscale.config.lengths import span_lengths

ROOT = Path(__file__).resolve().parent.parent
HOME, PAGE, PICTURE = Path("learning"), Path("docs/learning.md"), Path("docs/learning.svg")
VOCAB_SIZE, LENGTH, BATCH, STEPS, LR = 1024, 64, 32, 800, 1.0e-3
HELD_OUT_ONE_IN = 10
LEAST_FALL = 0.3
"""Nats by which the held-out loss must fall below that of a model that knows the frequencies of tokens."""
SIZES = {
    **{"hidden_size": 128, "num_attention_heads": 4, "num_layers": 2},
    **{"vocab_size": VOCAB_SIZE, "max_position_embeddings": LENGTH},
    **dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), 0.0),
}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], int]] = {
    # objective: (layout in words, parallel, model, ZeRO stage)
    "causal_lm": ("2 data-parallel, ZeRO 1", {}, {"architecture": "gpt"}, 1),
    "bert": (
        "2 tensor-parallel, sequence parallelism",
        {"tp_size": 2, "sequence_parallel": True},
        {},
        0,
    ),
    "roberta": ("2 data-parallel, ZeRO 2", {}, {}, 2),
    "bart": ("2 pipeline stages, ZeRO 1", {"pp_size": 2}, {}, 1),
    "t5": ("2 tensor-parallel, ZeRO 1", {"tp_size": 2}, {}, 1),
}


def lmscale(*arguments: str) -> None:
    """Run an `lmscale` command and end with its status if it fails."""
    done = subprocess.run([str(Path(sys.executable).parent / "lmscale"), *arguments], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def write_text() -> None:
    """Write the docstrings of each module as a document."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n".join(" ".join(docstring.split()) for docstring in found if docstring)
        if len(text) > 200:
            name = path.relative_to(library).as_posix()
            number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
            parts["valid" if number % HELD_OUT_ONE_IN == 0 else "train"].append(json.dumps({"text": text}))
    HOME.mkdir()
    for part, documents in parts.items():
        (HOME / f"{part}.jsonl").write_text("\n".join(documents) + "\n", encoding="utf-8")


def run_keys(objective: str) -> dict[str, Any]:
    """Make the config of an objective's run."""
    _, parallel, model, stage = RUNS[objective]
    architecture = model.get("architecture", objective)
    return {
        "model": {"architecture": architecture, **SIZES, **model},
        "tokenizer": {"path": str(HOME / "tokenizer")},
        "objective": {"name": objective},
        "data": {
            "train": [{"prefix": str(HOME / "train")}],
            "valid": [{"name": "docs", "prefix": str(HOME / "valid")}],
            "split": "1,0,0",
            "seq_length": LENGTH,
            "num_workers": 0,
        },
        "parallel": parallel,
        "batch": {"micro_batch_size": BATCH // 2, "global_batch_size": BATCH},
        "optim": {"lr": LR, "min_lr": LR / 10, "lr_warmup_tokens": STEPS // 10 * BATCH * LENGTH},
        "train": {"train_tokens": tokens(objective), "log_interval": 20, "eval_interval": 200, "eval_batches": 20},
        "checkpoint": {"save_interval": 0},
        "deepspeed": {"zero_optimization": {"stage": stage}},
        "output_dir": str(HOME / objective),
    }


def tokens(objective: str) -> int:
    """Count the tokens of STEPS steps, the decoder's places among them."""
    places = {"bart": 2 * LENGTH, "t5": LENGTH + span_lengths(LENGTH, 0.15, 3.0)[1]}.get(objective, LENGTH)
    return STEPS * BATCH * places


def train(objective: str) -> list[dict[str, Any]]:
    """Run an objective and return its metrics."""
    config = HOME / f"{objective}.yaml"
    config.write_text(yaml.safe_dump(run_keys(objective)))
    lmscale("train", str(config), "--devices", "2")
    lines = (HOME / objective / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def main() -> int:
    """Train all; the exit status says whether each has learned."""
    shutil.rmtree(HOME, ignore_errors=True)
    write_text()
    text = str(HOME / "train.jsonl")
    tokenizer = str(HOME / "tokenizer")
    lmscale(
        *("tokenizer", "train", "--input", text, "--vocab-size", str(VOCAB_SIZE)),
        *("--model-type", "bpe", "--output", tokenizer),
    )
    for part in ("train", "valid"):
        source = str(HOME / f"{part}.jsonl")
        lmscale(
            *("tokenize", "--input", source, "--tokenizer", tokenizer, "--sentences", "split"),
            *("--output", str(HOME / part)),
        )
    rows, curves, has_learned = [], {}, True
    unigram = unigram_entropy(HOME / "train", HOME / "valid", VOCAB_SIZE)
    for objective, (layout, *_) in RUNS.items():
        metrics = train(objective)
        curve = [(line["step"], line["train/lm_loss"]) for line in metrics if "train/lm_loss" in line]
        held_out = next(line["valid/docs/lm_loss"] for line in reversed(metrics) if "valid/docs/lm_loss" in line)
        curves[objective] = curve
        has_learned &= held_out <= unigram - LEAST_FALL
        rows.append(f"| {objective} | {layout} | {curve[0][1]:.2f} | {curve[-1][1]:.2f} | {held_out:.2f} |")
    plot_curves(PICTURE, curves)
    PAGE.write_text(_page(rows, unigram), encoding="utf-8")
    return 0 if has_learned else 1


def _page(rows: list[str], unigram: float) -> str:
    lines = [
        "# Every objective learns",
        "",
        f"Five models of about half a million parameters, trained for {STEPS} steps of {BATCH} samples of {LENGTH} tokens on",
        "the docstrings of Python's standard library, on two CPU ranks, each on another layout. The losses are in nats",
        "per predicted token; bert's includes its next-sentence loss while it trains, and t5's its z-loss. They are not",
        "comparable with each other: each objective predicts something else.",
        "",
        "![Losses by step](learning.svg)",
        "",
        "| objective | layout | first loss | last loss | held-out loss |",
        "|---|---|---|---|---|",
        *rows,
        "",
        f"A model that knows the frequencies of tokens alone would lose {unigram:.2f} nats on the held-out text. The run fails",
        f"if an objective does not end {LEAST_FALL} nats below that.",
        "",
        "`.venv/bin/python tools/learning_curves.py` writes this page again.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
