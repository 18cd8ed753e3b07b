"""Every objective, from text to losses: the same on each layout, in each precision, and after a resume."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from lmscale.config.data import TokenizerConfig
from lmscale.data.encode import encode_corpus
from lmscale.data.readers import PairReader, TextReader
from lmscale.data.sentences import SentenceSplitter
from lmscale.data.tokenizer_training import train_tokenizer
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""Relative, losses and gradient norms over the steps in fp32: sums in another order, nothing else."""
HALF_TOLERANCE = {"bf16": 4.0e-3, "fp16": 1.0e-3}
"""Relative, losses against fp32. Twice GPT's in test_ladder.py: T5's embeddings are drawn from N(0, 1), and a rounding
of them is as much larger."""
DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
VOCAB_SIZE, LENGTH, BATCH, STEPS = 420, 32, 8, 5
OBJECTIVES: dict[str, Keys] = {
    "bert": {"name": "bert"},
    "roberta": {"name": "roberta"},
    "bart": {"name": "bart", "preset": "bart_released"},
    "t5": {"name": "t5"},
    "text-to-text": {"name": "text_to_text"},
    "prefix-lm": {"name": "causal_lm", "prefix_lm": True},
}
LAYOUTS: dict[str, tuple[int, Keys]] = {
    "tp2-sp": (2, {"parallel__tp_size": 2, "parallel__sequence_parallel": True}),
    "tp2-pp2-zero1": (
        4,
        {"parallel__tp_size": 2, "parallel__pp_size": 2, **{"deepspeed__zero_optimization__stage": 1}},
    ),
    "tp2": (2, {"parallel__tp_size": 2}),
    "pp2": (2, {"parallel__pp_size": 2}),
    **{f"dp2-zero{stage}": (2, {"deepspeed__zero_optimization__stage": stage}) for stage in range(4)},
}


WORDS = "the cat dog sees a red house and runs away from it while birds sing over hills"


def _document(number: int) -> str:
    """Write three to seven sentences of four to nine words."""
    words = WORDS.split()
    chosen = [
        [words[(7 * number + 3 * i + j * j) % len(words)] for j in range(4 + (number + i) % 6)]
        for i in range(3 + number % 5)
    ]
    return " ".join(" ".join(sentence).capitalize() + "." for sentence in chosen)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Text of sentences, tokenized: (prefix, tokenizer)."""
    return prepare(tmp_path_factory.mktemp("text"))


def prepare(home: Path) -> tuple[str, str]:
    """Tokenize text of sentences: (prefix, tokenizer)."""
    text = home / "text.jsonl"
    text.write_text("".join(json.dumps({"text": _document(number)}) + "\n" for number in range(120)))
    train_tokenizer([str(text)], VOCAB_SIZE, "bpe", home / "tokenizer")
    tokenizer = TokenizerConfig(path=str(home / "tokenizer"))
    encode_corpus(
        [str(text)], tokenizer, home / "corpus", workers=1, reader=TextReader(splitter=SentenceSplitter("split"))
    )
    pairs = home / "pairs.jsonl"
    lines = [{"whole": _document(number), "first": _document(number).split()[0]} for number in range(120)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    encode_corpus([str(pairs)], tokenizer, home / "corpus-pairs", workers=1, reader=PairReader("whole", "first", "1: "))
    return str(home / "corpus"), tokenizer.path


def keys_of(objective: str, prepared: tuple[str, str], output_dir: Path, **changes: Any) -> Keys:
    """Make the config of a run."""
    prefix, tokenizer = prepared
    name = OBJECTIVES[objective]["name"]
    architecture = {"causal_lm": "gpt", "text_to_text": "t5"}.get(name, name)
    prefix += "-pairs" * (name == "text_to_text")
    keys: Keys = {
        "model": {
            "architecture": architecture,
            "num_layers": 4 if architecture in ("gpt", "bert", "roberta") else 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": LENGTH,
            **dict.fromkeys(("hidden_dropout", "attention_dropout", "ffn_dropout"), 0.0),
        },
        "tokenizer": {"path": tokenizer},
        "objective": dict(OBJECTIVES[objective]),
        "data": {"train": [{"prefix": prefix}], "split": "90,10,0", "seq_length": LENGTH, "num_workers": 0},
        "batch": {"micro_batch_size": 2, "global_batch_size": BATCH},
        "optim": {"lr": 1.0e-3},
        "train": {
            "train_tokens": 10**6,
            "stop_at_step": STEPS,
            "log_interval": 1,
            "eval_interval": 0,
            "eval_batches": 1,
        },
        "checkpoint": {"save_interval": 0},
        "monitor": {"tensorboard": False},
        "deepspeed": {"zero_optimization": {"stage": 0}},
        "output_dir": str(output_dir),
    }
    if name == "t5":
        keys["data"]["decoder_seq_length"] = 10  # 9 would do, but sequence parallelism splits it
    for path, value in changes.items():
        section = keys
        *parents, last = path.split("__")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return keys


class References:
    """One rank's run of each objective, trained where it is asked for."""

    def __init__(self, prepared: tuple[str, str], home: Path):
        self._prepared, self._home = prepared, home
        self._runs: dict[str, list[Keys]] = {}

    def __getitem__(self, name: str) -> list[Keys]:
        if name not in self._runs:
            self._runs[name] = pretrain_on_ranks(1, keys_of(name, self._prepared, self._home / name))
        return self._runs[name]


@pytest.fixture(scope="module")
def references(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> References:
    return References(prepared, tmp_path_factory.mktemp("references"))


def covered(second: Iterable[str], *quick: tuple[str, str]) -> list[Any]:
    """Pair every objective with each of `second`; `make test` runs `quick`, `make test-all` all."""
    return [
        pytest.param(objective, other, marks=[] if (objective, other) in quick else [pytest.mark.slow])
        for other in second
        for objective in OBJECTIVES
    ]


@pytest.mark.parametrize(
    ("objective", "layout"),
    covered(
        LAYOUTS,
        ("bert", "tp2-pp2-zero1"),
        ("roberta", "dp2-zero3"),
        ("bart", "tp2-sp"),
        ("t5", "tp2-pp2-zero1"),
        ("t5", "dp2-zero2"),
        ("text-to-text", "tp2-pp2-zero1"),
        ("prefix-lm", "tp2-sp"),
    ),
)
def test_layouts_train_alike(
    objective: str, layout: str, prepared: tuple[str, str], references: References, tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    run = pretrain_on_ranks(ranks, keys_of(objective, prepared, tmp_path, **changes))
    assert len(run) == STEPS
    assert largest_difference(losses(run), losses(references[objective])) < TOLERANCE
    assert largest_difference(norms(run), norms(references[objective])) < TOLERANCE
    last = [tag for tag in run[-1] if tag.startswith("valid/") and tag.endswith("loss")]
    assert len(last) == 1
    assert largest_difference([run[-1][last[0]]], [references[objective][-1][last[0]]]) < TOLERANCE


HALF_LAYOUTS = {"bf16": "tp2-pp2-zero1", "fp16": "dp2-zero2"}


@pytest.mark.parametrize(("objective", "precision"), covered(HALF_LAYOUTS, ("t5", "bf16"), ("bert", "fp16")))
def test_half_precision_follows_fp32(
    objective: str,
    precision: str,
    prepared: tuple[str, str],
    references: References,
    tmp_path: Path,
) -> None:
    ranks, changes = LAYOUTS[HALF_LAYOUTS[precision]]
    scale = {"loss_scale": {"initial": 256}} if precision == "fp16" else {}
    run = pretrain_on_ranks(ranks, keys_of(objective, prepared, tmp_path, precision=precision, **scale, **changes))
    assert largest_difference(losses(run), losses(references[objective])) < HALF_TOLERANCE[precision]


@pytest.mark.parametrize(
    ("objective", "layout"),
    covered(("tp2-pp2-zero1", "dp2-zero3"), ("bart", "tp2-pp2-zero1"), ("bert", "dp2-zero3")),
)
def test_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    objective: str, layout: str, prepared: tuple[str, str], tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    changes = {**changes, **DROPOUT}
    whole = pretrain_on_ranks(ranks, keys_of(objective, prepared, tmp_path / "whole", **changes))
    keys = keys_of(objective, prepared, tmp_path / "parts", **changes)
    keys["train"]["stop_at_step"] = 2
    pretrain_on_ranks(ranks, keys)
    keys["train"]["stop_at_step"] = STEPS
    run = pretrain_on_ranks(ranks, keys)
    assert [record["step"] for record in run] == list(range(1, STEPS + 1))
    assert losses(run) == losses(whole)
    assert norms(run) == norms(whole)
