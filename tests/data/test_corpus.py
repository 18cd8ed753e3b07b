from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from lmscale.data.corpus import SkipReport, expand_inputs, read_documents, read_records
from lmscale.errors import DataError

LINES = "".join(json.dumps({"text": f"document {number}", "body": f"body {number}"}) + "\n" for number in range(3))


def pack(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content)
    if packing == ".zst":
        # Two frames, as parallel compressors write them.
        half = len(content) // 2
        return b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
    return content


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_lines_of_jsonl_are_documents(tmp_path: Path, packing: str) -> None:
    (tmp_path / f"a.jsonl{packing}").write_bytes(pack(LINES.encode(), packing))
    assert list(read_documents([f"{tmp_path}/*"])) == ["document 0", "document 1", "document 2"]
    assert list(read_documents([f"{tmp_path}/*"], json_key="body")) == ["body 0", "body 1", "body 2"]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document_with_its_newlines(tmp_path: Path, packing: str) -> None:
    (tmp_path / f"a.txt{packing}").write_bytes(pack(b"one\r\n\n two\n", packing))
    assert list(read_documents([f"{tmp_path}/*"])) == ["one\r\n\n two\n"]


def test_globs_go_down_directories_and_name_each_file_once(tmp_path: Path) -> None:
    for name in ("b.txt", "x/a.txt", "x/y/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    found = expand_inputs([f"{tmp_path}/**/*.txt", f"{tmp_path}/b.txt"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.txt", "x/a.txt", "x/y/c.txt"]


def test_what_holds_no_text_is_skipped_counted_and_reported_with_its_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    lines = [b'{"text": "good"}', b'{"text": ', b'{"text": "\xff"}', b'{"other": "x"}', b'{"text": 3}', b"[]", b""]
    path.write_bytes(b"\n".join([*lines, b'{"text": "\\ud800"}', b'{"text": ""}', b'{"text": "last"}']))
    report = SkipReport()
    assert list(read_documents([str(path)], report=report)) == ["good", "last"]
    assert report.counts == {
        "broken JSON": 1,
        "invalid UTF-8": 1,
        "no string under the key 'text'": 3,
        "a lone surrogate, which is no text": 1,
        "an empty document": 1,
    }
    assert f"skipped {path}:2: broken JSON" in caplog.text
    assert f"skipped {path}:3: invalid UTF-8" in caplog.text


def test_strict_stops_at_the_first_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "good"}\n{"text"\n')
    documents = read_documents([str(path)], report=SkipReport(strict=True))
    assert next(documents) == "good"
    with pytest.raises(DataError, match=r"a\.jsonl:3: broken JSON"):
        next(documents)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "x"}\n')
    assert list(read_documents([f"{tmp_path}/a.jsonl"])) == ["x"]


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_a_truncated_or_foreign_archive_is_an_error_that_names_it(tmp_path: Path, packing: str) -> None:
    path = tmp_path / f"a.jsonl{packing}"
    for content in (pack(LINES.encode() * 100, packing)[:-6], b"no archive at all"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read") as caught:
            list(read_documents([str(path)]))
        assert caught.value.field == str(path)


def test_a_glob_without_files_and_a_file_of_another_kind_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file") as caught:
        expand_inputs([f"{tmp_path}/*.txt"])
    assert caught.value.value == f"{tmp_path}/*.txt"
    (tmp_path / "a.pdf").touch()
    with pytest.raises(DataError, match="no known kind"):
        expand_inputs([f"{tmp_path}/*"])


def test_progress_counts_every_byte_on_disk(tmp_path: Path) -> None:
    for packing in ("", ".gz", ".zst"):
        (tmp_path / f"a.jsonl{packing}").write_bytes(pack(LINES.encode() * 50, packing))
    paths = expand_inputs([f"{tmp_path}/*"])
    counts: list[int] = []
    list(read_records(paths, counts.append))
    assert sum(counts) == sum(path.stat().st_size for path in paths)
