"""`lmscale generate` and `lmscale evaluate` as a user calls them: a process of their own, no launcher, no port."""

from __future__ import annotations

import importlib.util
import json
import os
import re
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
}
PROMPT = "def f(x):"
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
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
    run_ranks(1, _write, str(tmp_path), "gpt")
    return tmp_path


def _write(home: str, architecture: str) -> None:
    from lmscale.config.io import parse_run
    from lmscale.models.build import build_model, logical_name, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology

    tokenizer = Path(home) / "tokenizer"
    init = {} if architecture == "t5" else {"std": 0.3}  # t5 draws by its own rule
    keys = run_keys({**MODEL, "architecture": architecture, "init": init}, tokenizer={"path": str(tokenizer)})
    keys["data"]["seq_length"] = 32
    context = build_context(parse_run(keys).model, init_topology(1, 1), seed=1)
    model = build_model(model_specs(context), context, LanguageModelLoss(context))
    tensors = {logical_name(model, name): parameter.detach() for name, parameter in model.named_parameters()}
    path = write_checkpoint(Path(home) / "checkpoint" / architecture, keys, tensors)
    shutil.copytree(tokenizer, path / "tokenizer")


@pytest.mark.distributed
def test_generate_prints_the_text_and_evaluate_the_loss(home):
    checkpoint, prefix = str(home / "checkpoint" / "gpt"), str(home / "tokens")
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
    statuses, outputs, errors = _call(calls)
    first, second, greedy, _, as_json, table, _ = outputs
    assert statuses == ["0", "0", "0", "2", "0", "0", "2"], errors

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
    assert errors.splitlines() == [
        f"error: text: {expected['prompt tokens']} tokens and 100 new ones are more than "
        "model.max_position_embeddings = 64; shorten the text or ask for fewer new tokens",
        "error: --data: is missing, and the run has no data.valid; name a PREFIX",
    ]


def _call(calls: list[list[str]]) -> tuple[list[str], list[str], str]:
    """Run commands in a process of their own: their statuses, what each prints, what all write to stderr."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=250)
    parts = done.stdout.split("STATUS ")
    return [part[0] for part in parts[1:]], [parts[0], *(part[2:] for part in parts[1:-1])], done.stderr


@pytest.mark.distributed
def test_generate_fills_masks_and_spans(home):
    for architecture in ("bert", "t5"):
        run_ranks(1, _write, str(home), architecture)
    bert, t5 = ["generate", str(home / "checkpoint" / "bert")], ["generate", str(home / "checkpoint" / "t5")]
    statuses, outputs, errors = _call(
        [
            [*bert, "--prompt", "def <mask>(x):"],
            [*bert, "--prompt", "def <mask>(x):", "--top-k", "2"],
            [*bert, "--prompt", "def f(x):"],
            [*bert, "--prompt", "def <mask>(x):", "--max-new-tokens", "3"],
            [*t5, "--prompt", "def <extra_id_0>(x):", "--max-new-tokens", "3", "--temperature", "0"],
            ["evaluate", bert[1], "--lm-eval", "anything"] if HAS_LM_EVAL else ["evaluate", bert[1], "--limit", "3"],
        ]
    )
    assert statuses == ["0", "0", "2", "2", "0", "2"], errors
    filled, shown, _, _, spans, _ = outputs
    assert filled.startswith("def")
    assert filled.endswith("(x):\n")
    assert shown.splitlines()[0] + "\n" == filled
    assert re.fullmatch(r"mask 1: '.*' 0\.\d{4}, '.*' 0\.\d{4}", shown.splitlines()[1])
    assert spans.startswith("def")
    assert spans.endswith("(x):\n")
    lines = errors.splitlines()
    assert lines[:2] == [
        "error: text: holds no mask; write <mask> where a token is to be found",
        "error: --max-new-tokens = 3: is not read by bert, which fills masks; leave it out",
    ]
    refusal = (
        "model.architecture = 'bert': gives a text no likelihood" if HAS_LM_EVAL else "--limit = '3.0': is read with"
    )
    assert refusal in lines[-1]


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


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["--limit", "3"], "--limit = '3.0': is read with --lm-eval only; leave it out"),
        (["--lm-eval", "piqa", "--data", "x"], "--data = 'x': is not read with --lm-eval; leave one of them out"),
        (["--lm-eval", ","], "--lm-eval: names no task"),
        (["--lm-eval", "piqa", "--limit", "0"], "--limit = 0.0: must be above 0"),
    ],
)
def test_options_of_the_harness_are_checked_before_the_model_is_loaded(capsys, options, error):
    assert main(["evaluate", "nowhere", *options]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("command", [["generate", "somewhere"], ["evaluate"]])
def test_arguments_that_are_missing_are_named(capsys, command):
    assert main(command) == 2
    assert capsys.readouterr().err.startswith("error: missing ")
