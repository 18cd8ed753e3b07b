"""Train a sentencepiece tokenizer that serves every objective.

Ids of the vocabulary, whose size counts all of them:
    0 <pad>, 1 <unk>, 2 <s>, 3 </s>, 4 <mask>, 5 <cls>, 6 <sep>, then the pieces (with 256 bytes first, unless the model
    is of type char), and <extra_id_99> .. <extra_id_0> at the end, so that <extra_id_0> is vocab_size - 1 as in T5.

Text is not normalized: newlines, tabs and runs of spaces are pieces like any other and come back as they were.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from lmscale.data.corpus import SkipReport, read_documents
from lmscale.data.tokenizer import MODEL_FILE, NUM_SENTINELS, SentencePieceTokenizer
from lmscale.errors import DataError, OutputError

# sentencepiece passes over sentences of more than 4,192 bytes, and a character has at most 4.
_PASSAGE = re.compile(r".{1,1000}(?<=\n)|.{1,1000}", re.DOTALL)
_MAX_PASSAGES = 5_000_000
_SEED = 1
_NUM_FRONT_IDS = 7
_LIMIT = re.compile(r"Please set it to a value <= (\d+)")
_REQUIRED = re.compile(r"smaller than required_chars\. \d+ vs (\d+)")
_OPTIONS: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,
    "pad_id": 0,
    "unk_id": 1,
    "bos_id": 2,
    "eos_id": 3,
    "control_symbols": ["<mask>", "<cls>", "<sep>"],
    "input_sentence_size": _MAX_PASSAGES,
    "shuffle_input_sentence": True,
    "minloglevel": 2,
}


def train_tokenizer(
    inputs: Sequence[str],
    vocab_size: int,
    model_type: Literal["unigram", "bpe", "char"],
    output_dir: str | Path,
    json_key: str = "text",
    strict: bool = False,
) -> SentencePieceTokenizer:
    """Train a tokenizer on a corpus and write output_dir/tokenizer.model, which appears whole or not at all.

    Of a corpus of more than 5,000,000 passages of 1,000 characters, a fixed random choice of that many is used.

    Args:
        inputs: globs of corpus files.
        vocab_size: ids in all, special ids and 100 sentinels included.
        model_type: unigram and bpe fall back to bytes for unseen characters; char maps them to <unk>.
        output_dir: created if missing.
        json_key: the key of the text in JSON lines.
        strict: stop at a broken line.

    Raises:
        DataError: if the corpus is missing, broken under `strict`, or cannot fill the vocabulary, or if the
            vocabulary has no room for the characters.
        OutputError: if the model cannot be written.
    """
    import sentencepiece

    passages = _Passages(read_documents(inputs, json_key, SkipReport(strict)))
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(_SEED)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=passages,
            model_writer=model,
            vocab_size=max(_NUM_FRONT_IDS, vocab_size - NUM_SENTINELS),
            model_type=model_type,
            byte_fallback=model_type != "char",
            num_threads=os.cpu_count() or 1,
            **_OPTIONS,
        )
    except RuntimeError as error:
        if passages.error is not None:
            raise passages.error from None
        raise _training_error(str(error), vocab_size) from None
    content = _append_sentinels(model.getvalue())
    _check_size(content, vocab_size)
    _write(Path(output_dir), content)
    return SentencePieceTokenizer(output_dir)


class _Passages:
    """The corpus cut to the length that sentencepiece takes; keeps the error that sentencepiece would swallow."""

    def __init__(self, documents: Iterator[str]):
        self._passages = (passage for text in documents for passage in _PASSAGE.findall(text))
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        try:
            passage: str = next(self._passages)
            return passage
        except StopIteration:
            raise
        except BaseException as error:
            self.error = error
            raise


def _training_error(message: str, vocab_size: int) -> DataError:
    if found := _LIMIT.search(message):
        return _too_large(vocab_size, int(found[1]) + NUM_SENTINELS)
    if found := _REQUIRED.search(message):
        return DataError(
            "is too small for the special ids, the bytes and the characters of the corpus",
            field="--vocab-size",
            value=vocab_size,
            remedy=f"give at least {int(found[1]) + NUM_SENTINELS}",
        )
    if "sentences_.empty()" in message:
        return DataError("holds no text to train a tokenizer on", field="--input")
    return DataError(f"sentencepiece cannot train: {message}", field="--input")


def _too_large(vocab_size: int, limit: int) -> DataError:
    remedy = f"give at most {limit}, or more text"
    return DataError("is more than the corpus can fill", field="--vocab-size", value=vocab_size, remedy=remedy)


def _append_sentinels(content: bytes) -> bytes:
    """Put the sentinels behind the pieces: sentencepiece itself reserves ids at the front only."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(content)
    for number in reversed(range(NUM_SENTINELS)):
        model.pieces.add(piece=f"<extra_id_{number}>", score=0.0, type=proto.ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.vocab_size = len(model.pieces)
    # The threads of the machine that trained it would make equal tokenizers unequal files.
    model.trainer_spec.ClearField("num_threads")
    serialized: bytes = model.SerializeToString(deterministic=True)
    return serialized


def _check_size(content: bytes, vocab_size: int) -> None:
    """Refuse a char model that fell short: sentencepiece takes its size for a limit."""
    import sentencepiece

    size = sentencepiece.SentencePieceProcessor(model_proto=content).vocab_size()
    if size < vocab_size:
        raise _too_large(vocab_size, size)
    if size > vocab_size:
        remedy = f"give at least {size}"
        raise DataError("is too small for the special ids", field="--vocab-size", value=vocab_size, remedy=remedy)


def _write(directory: Path, content: bytes) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory, prefix=".tokenizer-", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(file.name, 0o644)
                os.replace(file.name, directory / MODEL_FILE)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", field=str(directory)) from None
