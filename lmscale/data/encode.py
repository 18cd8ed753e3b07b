"""Text to .bin/.idx: this process reads and writes in order, and encodes chunks of documents with its workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.corpus import Record, Skipped, SkipReport, expand_inputs, read_records
from lmscale.data.index_file import dtype_for
from lmscale.data.manifest import Manifest
from lmscale.data.readers import Reader, TextReader
from lmscale.data.tokenizer import Tokenizer, document_end_id, load_tokenizer, open_tokenizer
from lmscale.data.writer import CorpusWriter
from lmscale.errors import DataError, RunError

if TYPE_CHECKING:
    from lmscale.config.data import TokenizerConfig

_CHUNK_BYTES = 1 << 17
_CHUNK_RECORDS = 4096
_CHUNKS_AHEAD = 4


@dataclass(frozen=True)
class EncodeResult:
    """What a tokenization made, and how fast."""

    manifest: Manifest
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens written for each second from the first byte read to the corpus in place."""
        return self.manifest.tokens / self.seconds


@dataclass(frozen=True)
class _Encoded:
    """A chunk on its way back: `tokens` of all its documents, `lengths` int32 [sentences], `counts` int32 [documents]."""

    tokens: bytes
    lengths: NDArray[np.int32]
    counts: NDArray[np.int32]
    skipped: list[Skipped]


@dataclass(frozen=True)
class _Encoder:
    """Encodes chunks; each worker holds one."""

    tokenizer: Tokenizer
    reader: Reader
    end_id: int | None

    def __call__(self, records: list[Record]) -> _Encoded:
        read = [self.reader(record) for record in records]
        ids, counts = self._encode([sequences for sequences in read if not isinstance(sequences, Skipped)])
        lengths = np.fromiter(map(len, ids), np.int32, len(ids))
        dtype = dtype_for(self.tokenizer.vocab_size)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), dtype, int(lengths.sum(dtype=np.int64)))
        skipped = [found for found in read if isinstance(found, Skipped)]
        return _Encoded(tokens.tobytes(), lengths, np.array(counts, np.int32), skipped)

    def _encode(self, documents: list[list[str]]) -> tuple[list[list[int]], list[int]]:
        """Return the ids of each sequence, and the number of sequences of each document."""
        encoded = iter(self.tokenizer.encode_batch(list(itertools.chain.from_iterable(documents))))
        ids: list[list[int]] = []
        counts = []
        for texts in documents:
            sequences = self.reader.finish(list(itertools.islice(encoded, len(texts))))
            if self.end_id is not None:
                sequences[-1].append(self.end_id)
            ids += sequences
            counts.append(len(sequences))
        return ids, counts


def encode_corpus(
    inputs: Sequence[str],
    tokenizer_config: TokenizerConfig,
    output_prefix: str | Path,
    workers: int | None = None,
    reader: Reader | None = None,
    strict: bool = False,
    append_eod: bool = True,
    made_from: str | None = None,
) -> EncodeResult:
    """Tokenize a corpus into PREFIX.bin, PREFIX.idx and PREFIX.json, which appear together, when whole.

    The output is the same for every number of workers. Memory holds a few chunks of 128 KiB of text for each worker (a
    longer document is a chunk of its own), 4 bytes for each sentence and 4 for each document.

    Args:
        inputs: globs of .txt and .jsonl files, also .gz and .zst.
        tokenizer_config: the tokenizer.
        output_prefix: the output; a former corpus there is replaced at the end.
        workers: processes that encode, this one included; None takes one for each CPU that this process may use.
            More than one needs what multiprocessing's "spawn" needs: a script guards its main.
        reader: makes the sequences of each document; None makes one, of the JSON key "text".
        strict: stop at a broken line, in the place of skipping and counting it.
        append_eod: put the tokenizer's eos id, or its sep id where it has no eos, behind the last sequence of a document.
        made_from: of a shard, for its manifest; a shard may be without a document, a corpus may not.

    Raises:
        DataError: if the input or the tokenizer cannot be used, or no document is left.
        OutputError: if the output cannot be written.
        RunError: if a worker dies.
    """
    began = time.perf_counter()
    tokenizer = load_tokenizer(tokenizer_config)
    end_id = document_end_id(tokenizer) if append_eod else None
    if append_eod and end_id is None:
        raise DataError("has no eos id to end documents with", field="tokenizer", value=tokenizer_config.path)
    paths = expand_inputs(inputs)
    report = SkipReport(strict)
    encoder = _Encoder(tokenizer, reader or TextReader(), end_id)
    with (
        CorpusWriter(output_prefix, dtype_for(tokenizer.vocab_size)) as writer,
        _mapper(workers or len(os.sched_getaffinity(0)), encoder, tokenizer_config) as encode,
        _progress(sum(path.stat().st_size for path in paths)) as advance,
    ):
        for chunk in encode(_chunks(read_records(paths, advance))):
            for skipped in chunk.skipped:
                report.add(skipped)
            writer.append(chunk.tokens, chunk.lengths, chunk.counts)
        if writer.num_documents == 0 and made_from is None:
            raise DataError("holds no documents", field="--input", value=" ".join(inputs))
        manifest = writer.finish(lambda sha256, size: _manifest(encoder, writer, report, sha256, size, made_from))
    return EncodeResult(manifest, time.perf_counter() - began)


def _manifest(
    encoder: _Encoder,
    writer: CorpusWriter,
    report: SkipReport,
    idx_sha256: str,
    bin_bytes: int,
    made_from: str | None,
) -> Manifest:
    return Manifest(
        tokenizer_hash=encoder.tokenizer.content_hash,
        vocab_size=encoder.tokenizer.vocab_size,
        eos_id=encoder.end_id,
        documents=writer.num_documents,
        tokens=writer.num_tokens,
        skipped=dict(report.counts),
        idx_sha256=idx_sha256,
        bin_bytes=bin_bytes,
        sentences=encoder.reader.division,
        made_from=made_from,
    )


def _chunks(records: Iterable[Record]) -> Iterator[list[Record]]:
    chunk: list[Record] = []
    size = 0
    for record in records:
        chunk.append(record)
        size += len(record.data)
        if size >= _CHUNK_BYTES or len(chunk) >= _CHUNK_RECORDS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_Map = Callable[[Iterable[list[Record]]], Iterator[_Encoded]]


@contextmanager
def _mapper(workers: int, encoder: _Encoder, config: TokenizerConfig) -> Iterator[_Map]:
    """Provide a lazy, ordered map over chunks, in this process and workers - 1 others."""
    if workers == 1:
        yield lambda chunks: map(encoder, chunks)
        return
    # Spawned, not forked: the caller may have threads (torch's, a progress bar's), whose locks a fork leaves locked.
    pool = ProcessPoolExecutor(
        workers - 1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(config.type, config.path, encoder.reader, encoder.end_id),
    )
    try:
        yield lambda chunks: _shared(pool, encoder, chunks, (workers - 1) * _CHUNKS_AHEAD)
    except BrokenProcessPool:
        raise RunError(
            "a worker process died", field="--workers", value=workers, remedy="if memory ran out, use fewer"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _shared(
    pool: ProcessPoolExecutor, encoder: _Encoder, chunks: Iterable[list[Record]], ahead: int
) -> Iterator[_Encoded]:
    """Encode chunks in the pool, and here while the pool has `ahead` of them to do; yield them in order.

    Here too, because workers take half a second to start, and a process that only reads would leave a CPU half idle.
    """
    results: deque[Future[_Encoded]] = deque()
    for chunk in chunks:
        if sum(not result.done() for result in results) < ahead:
            results.append(pool.submit(_encode_in_worker, chunk))
        else:
            results.append(Future())
            results[-1].set_result(encoder(chunk))
        # The bound keeps a worker's one long document from filling the memory with what comes after it.
        while results and (results[0].done() or len(results) >= 4 * ahead):
            yield results.popleft().result()
    while results:
        yield results.popleft().result()


_worker_encoder: _Encoder


def _start_worker(kind: str, path: str, reader: Reader, end_id: int | None) -> None:
    """Load the tokenizer, leave Ctrl-C to the parent, and die with it."""
    global _worker_encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _worker_encoder = _Encoder(open_tokenizer(kind, path), reader, end_id)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(records: list[Record]) -> _Encoded:
    return _worker_encoder(records)


@contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], Any]]:
    """Show a bar of the bytes read, where the error stream is a terminal."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("tokenize"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenize", total=total_bytes)
        yield lambda count: progress.advance(task, count)
