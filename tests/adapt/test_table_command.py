"""`lmscale generate` with adaptations: one prompt, and a file of prompts that name theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lmscale.data.tokenizer_training import train_tokenizer
from tests.adapt.written import write_adaptation, write_base
from tests.cli.test_model_commands import VOCAB_SIZE, _call
from tests.data.corpora import TEXTS

pytestmark = pytest.mark.distributed


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A base with a tokenizer, and two adaptations of it."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    train_tokenizer([str(tmp_path / "text.jsonl")], VOCAB_SIZE, "bpe", tmp_path / "tokenizer")
    base = write_base(tmp_path / "base", "gpt", tokenizer=tmp_path / "tokenizer", vocab_size=VOCAB_SIZE)
    write_adaptation(tmp_path / "lora", base, {"method": "lora", "rank": 2, "targets": ["proj", "fc2"]})
    write_adaptation(tmp_path / "prefix", base, {"method": "prefix_tuning", "length": 3, "projection": 5})
    return tmp_path


def test_generate_takes_adaptations_by_name_and_a_file_of_prompts(home):
    both = ["--adapter", f"anna={home / 'lora'}", "--adapter", f"bert={home / 'prefix'}", "--slots", "1"]
    short = ["--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]
    base, prompt = ["generate", str(home / "base")], ["--prompt", "def f(x):"]
    rows = [{"prompt": "def f(x):", "adapter": name, "id": n} for n, name in enumerate(["anna", None, "bert", "anna"])]
    rows.append({"prompt": "def f(x):"})
    (home / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "unknown.jsonl").write_text(json.dumps({"prompt": "x", "adapter": "ana"}) + "\n")
    (home / "broken.jsonl").write_text('{"prompt": "x"}\n{"text": "x"}\n')
    file = ["--input", str(home / "in.jsonl"), *short]
    statuses, outputs, errors = _call(
        [
            ["generate", str(home / "lora"), *prompt, *short],
            ["generate", str(home / "prefix"), "--base", str(home / "base"), *prompt, *short],
            [*base, *prompt, *short],
            [*base, *prompt, *short, *both[:2]],
            [*base, *prompt, *short, *both, "--slots", "2"],
            [*base, *file, *both],
            [*base, *file, *both, "--output", str(home / "out.jsonl")],
            [*base, "--input", str(home / "unknown.jsonl"), *both],
            [*base, "--input", str(home / "broken.jsonl"), *both],
            [*base, *file],
            [*base, *short, *prompt, "--adapter", "anna"],
            [*base, *short],
        ]
    )
    assert statuses == ["0"] * 7 + ["2"] * 5, errors
    anna, bert, plain = (text.removesuffix("\n") for text in outputs[:3])
    assert len({anna, bert, plain}) == 3, "the adaptations change nothing"
    assert outputs[3] == f"{anna}\n"
    assert outputs[4] == f"anna: {anna}\nbert: {bert}\n"
    wanted = [{**row, "text": text} for row, text in zip(rows, [anna, plain, bert, anna, plain], strict=True)]
    assert [json.loads(line) for line in outputs[5].splitlines()] == wanted
    assert [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()] == wanted
    assert errors.splitlines() == [
        "error: adapter = 'ana': there is no such adaptation; did you mean 'anna'?",
        f'error: {home}/broken.jsonl:2: must be an object with a text at "prompt"',
        "error: adapter = 'anna': there is no such adaptation; give --adapter NAME=PATH",
        "error: --adapter = 'anna': must be NAME=PATH",
        "error: missing option '--prompt', or '--input'; see lmscale generate --help",
    ]
