"""`lmscale generate` and `lmscale evaluate` as a user calls them: a process of their own, no launcher, no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lmscale.cli.main import main
from lmscale.config.data import TokenizerConfig
from lmscale.data.encode import encode_corpus
from lmscale.data.tokenizer_training import train_tokenizer
from tests.data.corpora import TEXTS
from tests.distributed.ranks import run_ranks
from tests.evaluate.checkpoints import run_keys, write_checkpoint

VOCAB_SIZE = 450
MODEL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "init": {"std": 0.3},
}
PROMPT = "def f(x):"
CALLS = """
import json, sys
from lmscale.cli.main import main
for arguments in json.loads(sys.argv[1]):
    status = main(arguments)
    print(f"STATUS {status}", flush=True)
"""


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A tokenizer, a corpus and a random checkpoint."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    text, tokenizer = [str(tmp_path / "text.jsonl")], tmp_path / "tokenizer"
    train_tokenizer(text, VOCAB_SIZE, "bpe", tokenizer)
    encode_corpus(text, TokenizerConfig(path=str(tokenizer)), tmp_path / "tokens", workers=1)
    run_ranks(1, _write, str(tmp_path))
    return tmp_path


def _write(home: str) -> None:
    from lmscale.config.io import parse_run
    from lmscale.models.build import build_model, logical_name
    from lmscale.models.context import build_context
    from lmscale.models.decoder import decoder_specs
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology

    tokenizer = Path(home) / "tokenizer"
    keys = run_keys(MODEL, tokenizer={"path": str(tokenizer)})
    context = build_context(parse_run(keys).model, init_topology(1, 1), seed=1)
    model = build_model(decoder_specs(context), context, LanguageModelLoss(context))
    tensors = {logical_name(model, name): parameter.detach() for name, parameter in model.named_parameters()}
    path = write_checkpoint(Path(home) / "checkpoint", keys, tensors)
    shutil.move(tokenizer, path / "tokenizer")


@pytest.mark.distributed
def test_generate_prints_the_text_and_evaluate_the_loss(home):
    checkpoint, prefix = str(home / "checkpoint"), str(home / "tokens")
    generate = ["generate", checkpoint, "--prompt", PROMPT, "--max-new-tokens", "12", "--seed", "3"]
    calls = [
        generate,
        generate,
        [*generate, "--temperature", "0"],
        [*generate, "--max-new-tokens", "100"],
        ["evaluate", checkpoint, "--data", prefix, "--json"],
        ["evaluate", checkpoint, "--data", prefix],
        ["evaluate", checkpoint],
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=250)
    outputs = done.stdout.split("STATUS ")
    statuses = [output[0] for output in outputs[1:]]
    first, second, greedy, _, as_json, table, _ = [outputs[0], *(output[2:] for output in outputs[1:-1])]
    assert statuses == ["0", "0", "0", "2", "0", "0", "2"], done.stderr

    expected = run_ranks(1, _generate, checkpoint, prefix)[0]
    assert first == second == expected["sampled"] + "\n"
    assert greedy == expected["greedy"] + "\n"
    assert first.startswith(PROMPT)
    assert first != greedy
    (row,) = json.loads(as_json)
    assert row.pop("prefix") == expected["measured"].pop("prefix") == prefix
    assert row == pytest.approx(expected["measured"], rel=1e-5)
    assert f"{row['loss']:.4f}" in table
    assert f"{row['perplexity']:.2f}" in table
    lines = done.stderr.splitlines()
    assert lines == [
        f"error: text: {expected['prompt tokens']} tokens and 100 new ones are more than "
        "model.max_position_embeddings = 64; shorten the text or ask for fewer new tokens",
        "error: --data: is missing, and the run has no data.valid; name a PREFIX",
    ]


def _generate(checkpoint: str, prefix: str) -> dict[str, object]:
    from dataclasses import asdict

    from lmscale.evaluate.inference import load
    from lmscale.evaluate.perplexity import measure_corpus

    model = load(checkpoint)
    measured = measure_corpus(model, prefix)
    return {
        "sampled": model.generate(PROMPT, 12, seed=3)[0],
        "greedy": model.generate(PROMPT, 12, temperature=0.0)[0],
        "measured": {**asdict(measured), "perplexity": measured.perplexity},
        "prompt tokens": len(model.tokenizer.encode(PROMPT)),
    }


@pytest.mark.parametrize("command", [["generate", "nowhere", "--prompt", "x"], ["evaluate", "nowhere"]])
def test_a_checkpoint_that_is_not_there_is_refused_at_once(capsys, command):
    assert main(command) == 2
    assert capsys.readouterr().err == "error: checkpoint = 'nowhere': does not exist\n"


@pytest.mark.parametrize("command", [["generate", "somewhere"], ["evaluate"]])
def test_arguments_that_are_missing_are_named(capsys, command):
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: missing ")
