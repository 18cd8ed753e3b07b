from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lmscale.config.data import TokenizerConfig
from lmscale.data import writer as writer_module
from lmscale.data.encode import encode_corpus
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.readers import TextReader
from lmscale.data.sentences import SentenceMode, SentenceSplitter
from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.errors import EXIT_BAD_INPUT, DataError, OutputError
from tests.data.corpora import TEXTS, write_corpus


@pytest.fixture
def config(tokenizer_path: str) -> TokenizerConfig:
    return TokenizerConfig(path=tokenizer_path)


@pytest.fixture
def large_file(tmp_path: Path) -> Path:
    """Some seconds of work."""
    path = tmp_path / "in" / "large.jsonl"
    path.parent.mkdir()
    with path.open("w") as file:
        for number in range(20_000):
            file.write(json.dumps({"text": f"{number} " + TEXTS[number % 4] * 3}) + "\n")
    return path


def test_documents_are_encoded_and_ended(
    corpus_file: Path, config: TokenizerConfig, tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    manifest = encode_corpus([str(corpus_file)], config, tmp_path / "c", workers=1).manifest
    corpus = IndexedCorpus(tmp_path / "c")
    expected = [[*tokenizer.encode(text), tokenizer.eos_id] for text in TEXTS]
    assert [corpus.document(number).tolist() for number in range(corpus.num_documents)] == expected
    assert corpus.manifest == manifest
    assert (manifest.documents, manifest.tokens, manifest.eos_id) == (len(TEXTS), corpus.num_tokens, 3)
    assert manifest.tokenizer_hash == tokenizer.content_hash
    assert corpus.tokens.dtype == np.uint16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx", "c.json"]


@pytest.mark.parametrize("mode", ["split", "lines"])
def test_sentences_are_sequences_and_the_last_one_has_the_document_end(
    corpus_file: Path, config: TokenizerConfig, tokenizer: SentencePieceTokenizer, tmp_path: Path, mode: SentenceMode
) -> None:
    splitter = SentenceSplitter(mode)
    manifest = encode_corpus(
        [str(corpus_file)], config, tmp_path / "c", workers=1, reader=TextReader(splitter=splitter)
    ).manifest
    assert (manifest.sentences, manifest.documents) == (mode, len(TEXTS))
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.has_sentences
    sentences = [piece.tolist() for piece in np.split(corpus.tokens, corpus.sentence_offsets[1:-1])]
    for number, text in enumerate(TEXTS):
        first, behind = corpus.document_sentences[number : number + 2]
        expected = [tokenizer.encode(sentence) for sentence in splitter(text)]
        expected[-1].append(tokenizer.eos_id)
        assert sentences[first:behind] == expected
        assert tokenizer.decode(corpus.document(number)) == text


def test_a_tokenizer_without_eos_ends_documents_with_sep_and_makes_no_empty_sentence(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three", "."]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (tmp_path / "a.jsonl").write_text('{"text": "One.\\n\\u200b\\nTwo three."}\n{"text": " "}\n')
    config = TokenizerConfig(type="hf", path=str(tmp_path))
    splitter = SentenceSplitter("lines")
    encode_corpus([str(tmp_path / "a.jsonl")], config, tmp_path / "c", workers=1, reader=TextReader(splitter=splitter))
    corpus = IndexedCorpus(tmp_path / "c")
    assert corpus.tokens.tolist() == [5, 8, 6, 7, 8, 3, 3]
    assert corpus.sentence_offsets.tolist() == [0, 2, 6, 7]
    assert corpus.document_sentences.tolist() == [0, 2, 3]


def test_the_output_does_not_depend_on_the_number_of_workers(
    large_file: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    large_file.write_text("".join(large_file.read_text().splitlines(keepends=True)[:3000]) + "{broken\n")
    for workers in (1, 3):
        encode_corpus([str(large_file)], config, tmp_path / f"c{workers}", workers)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"c1.{suffix}").read_bytes() == (tmp_path / f"c3.{suffix}").read_bytes()


def test_skipped_lines_are_counted_in_the_manifest(config: TokenizerConfig, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{broken\n{"text": 1}\n')
    manifest = encode_corpus([str(path)], config, tmp_path / "c", workers=1).manifest
    assert manifest.documents == 1
    assert manifest.skipped == {"broken JSON": 1, "no string under the key 'text'": 1}


def test_sentences_do_not_depend_on_the_number_of_workers(
    corpus_file: Path, config: TokenizerConfig, tmp_path: Path
) -> None:
    for workers in (1, 2):
        encode_corpus(
            [str(corpus_file)],
            config,
            tmp_path / f"c{workers}",
            workers,
            reader=TextReader(splitter=SentenceSplitter("split")),
        )
    assert (tmp_path / "c1.idx").read_bytes() == (tmp_path / "c2.idx").read_bytes()


@pytest.mark.parametrize("workers", [1, 2])
def test_strict_leaves_nothing_and_keeps_the_former_corpus(
    config: TokenizerConfig, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{broken\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: broken JSON"):
        encode_corpus([str(path)], config, tmp_path / "out" / "c", workers, strict=True)
    assert not list((tmp_path / "out").iterdir())
    write_corpus(tmp_path / "out" / "c", [[1, 2]])
    with pytest.raises(DataError):
        encode_corpus([str(path)], config, tmp_path / "out" / "c", workers, strict=True)
    assert IndexedCorpus(tmp_path / "out" / "c").tokens.tolist() == [1, 2]


def test_a_corpus_without_documents_is_an_error(config: TokenizerConfig, tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(DataError, match="no documents"):
        encode_corpus([f"{tmp_path}/*.txt"], config, tmp_path / "out" / "c", workers=1)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("file_number", [0, 1, 2])
def test_a_full_disk_is_one_clear_error_and_leaves_nothing(
    corpus_file: Path, config: TokenizerConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file_number: int
) -> None:
    calls = iter(range(10))
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == file_number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(writer_module.os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full") as caught:
        encode_corpus([str(corpus_file)], config, tmp_path / "out" / "c", workers=1)
    assert caught.value.exit_status == EXIT_BAD_INPUT
    assert not list((tmp_path / "out").iterdir())


_PROGRAM = """
import resource, sys
from lmscale.config.data import TokenizerConfig
from lmscale.data.encode import encode_corpus
from lmscale.errors import LmscaleError

if __name__ == "__main__":
    source, tokenizer, output, workers, limit = sys.argv[1:]
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    try:
        encode_corpus([source], TokenizerConfig(path=tokenizer), output, int(workers))
    except LmscaleError as error:
        print(f"{type(error).__name__}: {error}")
"""


def start(tmp_path: Path, *arguments: object) -> subprocess.Popen[str]:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, str(program), *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_limit_on_the_size_of_files_while_writing_is_a_full_disk(
    large_file: Path, config: TokenizerConfig, tmp_path: Path, workers: int
) -> None:
    process = start(tmp_path, large_file, config.path, tmp_path / "out" / "c", workers, 1 << 20)
    out, err = process.communicate(timeout=60)
    assert out.startswith("OutputError: ")
    assert "the disk is full" in out
    assert err == ""
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_leaves_nothing_that_looks_done_and_no_process(
    large_file: Path, corpus_file: Path, config: TokenizerConfig, tmp_path: Path, kill: signal.Signals
) -> None:
    output = tmp_path / "out" / "c"
    process = start(tmp_path, large_file, config.path, output, 2, 0)
    _wait_until(lambda: output.with_suffix(".bin.partial").exists())
    time.sleep(0.3)
    os.kill(process.pid, kill)
    process.communicate(timeout=60)
    left = {path.name for path in output.parent.iterdir()}
    assert left == ({"c.bin.partial"} if kill == signal.SIGKILL else set())
    _wait_until(lambda: not _has_processes(process.pid))
    encode_corpus([str(corpus_file)], config, output, workers=1)
    assert {path.name for path in output.parent.iterdir()} == {"c.bin", "c.idx", "c.json"}


def _wait_until(condition: object, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _has_processes(group: int) -> bool:
    """Tell whether a process group has members that run; zombies that nobody waits for do not."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, member_of = entry.read_text().rpartition(")")[2].split()[:3]
            if int(member_of) == group and state != "Z":
                return True
    return False


def test_two_runs_do_not_write_one_output(corpus_file: Path, config: TokenizerConfig, tmp_path: Path) -> None:
    with writer_module.CorpusWriter(tmp_path / "c", np.uint16) as first:
        first.append(np.array([1, 2], np.uint16).tobytes(), np.array([2], np.int32))
        with pytest.raises(DataError, match="another process"):
            encode_corpus([str(corpus_file)], config, tmp_path / "c", workers=1)
        assert (tmp_path / "c.bin.partial").exists()
