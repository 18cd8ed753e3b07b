from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lmscale.cli.data_commands import data_app, tokenize, tokenizer_app
from lmscale.errors import ConfigError, DataError

TEXT = "The quick brown fox jumps over the lazy dog,\n\tand 2 + 2 = 4.\n" * 20

app = typer.Typer()
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")
app.command("tokenize")(tokenize)


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"body": f"{number} {TEXT}"}) + "\n" for number in range(3)) + "{\n")
    return path


def test_text_becomes_a_corpus_that_can_be_looked_into(text: Path, tmp_path: Path) -> None:
    key = ("--json-key", "body")
    vocabulary = ("--vocab-size", 405, "--model-type", "bpe")
    # A shell that expands a glob gives several files to one --input.
    out = call("tokenizer", "train", "--input", text, text, *vocabulary, "--output", tmp_path / "tokenizer", *key)
    assert "405 ids, bpe" in out
    tokenizer = ("--tokenizer", tmp_path / "tokenizer")
    prefix = tmp_path / "corpus"
    out = call("tokenize", "--input", text, *tokenizer, "--output", prefix, "--workers", 1, *key)
    assert "3 documents" in out
    assert "skipped 1: broken JSON" in out
    out = call("data", "inspect", prefix, "--documents", 1, *tokenizer)
    assert "uint16" in out
    assert "0 The quick brown fox jumps over the lazy dog,\n" in out
    assert "document 1" not in out


def test_pairs_are_kept_and_begin_with_their_task(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"q": f"{number} {TEXT}", "a": str(number)}) + "\n" for number in range(5)))
    vocabulary = ("--vocab-size", 405, "--model-type", "bpe", "--output", tmp_path / "tokenizer")
    call("tokenizer", "train", "--input", path, "--json-key", "q", *vocabulary)
    prefix, tokenizer = tmp_path / "pairs", ("--tokenizer", tmp_path / "tokenizer")
    pair = ("--pair", "q", "a", "--task-prefix", "count: ")
    assert "5 documents" in call("tokenize", "--input", path, *tokenizer, "--output", prefix, *pair)
    out = call("data", "inspect", prefix, *tokenizer)
    assert "10 (pairs)" in out
    assert "count: 0 The quick" in out


def test_options_that_pairs_do_not_read_are_refused(tmp_path: Path) -> None:
    line = ["tokenize", "--input", "a.jsonl", "--tokenizer", "t", "--output", "p"]
    for options, field in (
        (["--task-prefix", "x: "], "--task-prefix"),
        (["--pair", "q", "a", "--sentences", "lines"], "--sentences"),
        (["--pair", "q", "a", "--json-key", "body"], "--json-key"),
        (["--pair", "q", "q"], "--pair"),
        (["--language", "de"], "--language"),
        (["--sentences", "lines", "--language", "de"], "--language"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}"):
            CliRunner().invoke(app, line + options, catch_exceptions=False)


def test_pairs_of_whole_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    call(
        *("tokenizer", "train", "--input", tmp_path / "a.txt", "--vocab-size", 405, "--model-type", "bpe"),
        *("--output", tmp_path / "tokenizer"),
    )
    line = ["tokenize", "--input", str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path / "tokenizer")]
    with pytest.raises(DataError, match="holds one text, and pairs have two"):
        CliRunner().invoke(app, [*line, "--output", str(tmp_path / "p"), "--pair", "q", "a"], catch_exceptions=False)
    assert not list(tmp_path.glob("p.*"))


def test_sentences_are_kept_where_they_are_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Mr. Fox jumps.  Dogs sleep.\nAnd so on.\n" * 20)
    key = ("--input", tmp_path / "a.txt")
    call("tokenizer", "train", *key, "--vocab-size", 390, "--model-type", "bpe", "--output", tmp_path / "tokenizer")
    for mode, count in (("split", 60), ("lines", 40)):
        prefix = tmp_path / mode
        call("tokenize", *key, "--tokenizer", tmp_path / "tokenizer", "--output", prefix, "--sentences", mode)
        assert f"{count} ({mode})" in call("data", "inspect", prefix)


def test_strict_stops_at_a_broken_line(text: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl:4: broken JSON"):
        call(
            *("tokenizer", "train", "--input", text, "--vocab-size", 400, "--output", tmp_path),
            *("--json-key", "body", "--strict"),
        )


def test_a_corpus_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        call("data", "inspect", tmp_path / "nothing")
