"""Tokenizers: sentencepiece models, ours or anybody's, and HF's."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lmscale.errors import DataError

if TYPE_CHECKING:
    from lmscale.config.data import TokenizerConfig

MODEL_FILE = "tokenizer.model"
NUM_SENTINELS = 100
_SPACE_MARK = "\u2581"  # sentencepiece writes a space so, and would read the character itself back as one
_START_MARKS = (_SPACE_MARK, "\u0120")  # of sentencepiece; of byte-level BPE, which writes a space so
_CONTINUATION_MARK = "##"  # of WordPiece; byte-level BPE has a few such pieces too, which are text
HF_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
)


class Tokenizer(Protocol):
    """What lmscale asks of a tokenizer. An id that it does not have is None.

    Special tokens are never found in text: a document that spells "</s>" encodes to its characters.
    """

    vocab_size: int
    """Entries, special ids included; ids are below it."""
    pad_id: int | None
    bos_id: int | None
    eos_id: int | None
    """Also the end of a document in an indexed corpus, for which sep stands in where there is no eos."""
    mask_id: int | None
    cls_id: int | None
    sep_id: int | None
    mask_text: str | None
    """How people write the mask in a prompt."""
    sentinel_ids: list[int]
    """Of <extra_id_0>, <extra_id_1>, ...; ours descend from vocab_size - 1."""
    special_ids: list[int]
    """Sorted: every id that stands for no text."""
    content_hash: str
    """SHA-256 of what defines the tokenizer: equal hashes, equal ids."""

    def encode(self, text: str) -> list[int]:
        """Encode one text, adding no special ids."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts in this thread."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids are left out."""
        ...

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, spelt as it is there."""
        ...

    def word_starts(self) -> NDArray[np.bool_]:
        """Tell which ids begin a word, bool [vocab_size]; special ids do.

        Raises:
            DataError: if no piece is marked as one that begins, or continues, a word.
        """
        ...


class SentencePieceTokenizer:
    """A sentencepiece model. See `Tokenizer`.

    With a model of `train_tokenizer`, decode(encode(text)) == text for every text, except characters that a char model
    never saw.

    Args:
        path: the .model file, or a directory that holds tokenizer.model.

    Raises:
        DataError: if there is no model, or the file is not one.
    """

    def __init__(self, path: str | Path):
        import sentencepiece

        file = sentencepiece_file(path)
        content = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self.vocab_size: int = self._processor.vocab_size()
        except (RuntimeError, TypeError):
            raise DataError("is not a sentencepiece model", field="tokenizer.path", value=str(file)) from None
        self.content_hash = hashlib.sha256(content).hexdigest()
        self.pad_id = self._special(self._processor.pad_id(), "<pad>")
        self.bos_id = self._special(self._processor.bos_id(), "<s>")
        self.eos_id = self._special(self._processor.eos_id(), "</s>")
        self.mask_id, self.cls_id, self.sep_id = (self._special(-1, name) for name in ("<mask>", "<cls>", "<sep>"))
        self.mask_text: str | None = "<mask>" if self.mask_id is not None else None
        sentinels = (self._special(-1, f"<extra_id_{number}>") for number in range(NUM_SENTINELS))
        self.sentinel_ids = [number for number in sentinels if number is not None]
        numbers = list(range(self.vocab_size))
        pieces = self._processor
        kinds = (pieces.is_control(numbers), pieces.is_unknown(numbers), pieces.is_unused(numbers))
        is_special = np.any(kinds, axis=0)
        self.special_ids = sorted({*np.flatnonzero(is_special).tolist(), *_known_special_ids(self)})
        marks = [self._special(-1, f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._space_mark_ids = [number for number in marks if number is not None]

    def _special(self, number: int, piece: str) -> int | None:
        if number >= 0:
            return number
        number = self._processor.piece_to_id(piece)
        return None if number == self._processor.unk_id() else number

    def encode(self, text: str) -> list[int]:
        """Encode one text, adding no special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts in this thread."""
        ids: list[list[int]] = self._processor.encode(list(texts), out_type=int, num_threads=1)
        if len(self._space_mark_ids) == len(_SPACE_MARK.encode()):
            for row, text in enumerate(texts):
                if _SPACE_MARK in text:
                    ids[row] = self._encode_space_marks(text)
        return ids

    def _encode_space_marks(self, text: str) -> list[int]:
        """Spell U+2581 in bytes, so that it does not come back as a space."""
        first, *others = self._processor.encode(text.split(_SPACE_MARK), out_type=int, num_threads=1)
        ids: list[int] = list(first)
        for part in others:
            ids += self._space_mark_ids + part
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids are left out."""
        text: str = self._processor.decode([int(number) for number in ids])
        return text

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, spelt as it is there."""
        return self._special(-1, piece)

    def word_starts(self) -> NDArray[np.bool_]:
        """Tell which ids begin a word, bool [vocab_size]; special ids do."""
        pieces: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        return _word_starts(dict(zip(pieces, range(self.vocab_size), strict=True)), self)


class HfTokenizer:
    """A tokenizer of transformers, from a local directory. See `Tokenizer`.

    Args:
        path: a directory that AutoTokenizer reads.

    Raises:
        DataError: if transformers is missing, or the directory holds no tokenizer.
    """

    def __init__(self, path: str | Path):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise DataError(
                "needs transformers, which is not installed",
                field="tokenizer.type",
                value="hf",
                remedy="pip install lmscale[hf]",
            ) from None
        self.content_hash = hash_hf_files(path)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # broken files raise whatever the code that reads them happens to
            raise DataError(
                f"transformers finds no tokenizer: {type(error).__name__}: {error}",
                field="tokenizer.path",
                value=str(path),
            ) from None
        # Otherwise a document that spells a special token would inject it.
        self._tokenizer.split_special_tokens = True
        self.vocab_size = len(self._tokenizer)
        self.pad_id: int | None = self._tokenizer.pad_token_id
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int | None = self._tokenizer.eos_token_id
        self.mask_id: int | None = self._tokenizer.mask_token_id
        self.mask_text: str | None = self._tokenizer.mask_token
        self.cls_id: int | None = self._tokenizer.cls_token_id
        self.sep_id: int | None = self._tokenizer.sep_token_id
        vocabulary = self._tokenizer.get_vocab()
        names = (f"<extra_id_{number}>" for number in range(NUM_SENTINELS))
        self.sentinel_ids: list[int] = [vocabulary[name] for name in names if name in vocabulary]
        self.special_ids = sorted({*self._tokenizer.all_special_ids, *_known_special_ids(self)})

    def encode(self, text: str) -> list[int]:
        """Encode one text, adding no special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode many texts; transformers may use its own threads."""
        options: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        ids: list[list[int]] = self._tokenizer(list(texts), **options)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special ids are left out."""
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        text: str = self._tokenizer.decode([int(number) for number in ids], **options)
        return text

    def piece_id(self, piece: str) -> int | None:
        """Return the id of a piece of the vocabulary, spelt as it is there."""
        number: int | None = self._tokenizer.get_vocab().get(piece)
        return number

    def word_starts(self) -> NDArray[np.bool_]:
        """Tell which ids begin a word, bool [vocab_size]; special ids do."""
        return _word_starts(self._tokenizer.get_vocab(), self)


def _known_special_ids(tokenizer: Tokenizer) -> set[int]:
    named = (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.cls_id)
    return {number for number in (*named, tokenizer.sep_id, *tokenizer.sentinel_ids) if number is not None}


def _word_starts(vocabulary: dict[str, int], tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Tell which ids begin a word, by the mark that most pieces have."""
    counts = {mark: sum(piece.startswith(mark) for piece in vocabulary) for mark in (*_START_MARKS, _CONTINUATION_MARK)}
    mark = max(counts, key=lambda each: counts[each])
    if counts[mark] == 0:
        raise DataError(
            "its pieces do not show where words begin", field="tokenizer.path", remedy="mask tokens, not words"
        )
    starts = np.zeros(tokenizer.vocab_size, np.bool_)
    for piece, number in vocabulary.items():
        starts[number] = piece.startswith(mark) != (mark == _CONTINUATION_MARK)
    starts[tokenizer.special_ids] = True
    return starts


def load_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Load the tokenizer that a config names.

    Raises:
        DataError: if there is none at its path.
    """
    return open_tokenizer(config.type, config.path)


def open_tokenizer(kind: str, path: str) -> Tokenizer:
    """Do as `load_tokenizer` does, without a config: pydantic would double the time that a worker takes to start."""
    return HfTokenizer(path) if kind == "hf" else SentencePieceTokenizer(path)


def padded_sizes(num_ids: int, multiple: int) -> tuple[int, int]:
    """Return the sizes that a model's vocabulary may have: the tokenizer's, and that rounded up to a multiple."""
    return num_ids, -(-num_ids // multiple) * multiple


def document_end_id(tokenizer: Tokenizer) -> int | None:
    """Return the id that ends a document: eos, or sep of a tokenizer without it, as BERT's is."""
    return tokenizer.sep_id if tokenizer.eos_id is None else tokenizer.eos_id


def tokenizer_hash(config: TokenizerConfig) -> str:
    """Compute a tokenizer's `content_hash` from its files alone, without loading it."""
    if config.type == "hf":
        return hash_hf_files(config.path)
    return hashlib.sha256(sentencepiece_file(config.path).read_bytes()).hexdigest()


def sentencepiece_file(path: str | Path) -> Path:
    """Find the model file that a path, file or directory, stands for.

    Raises:
        DataError: if there is none.
    """
    file = Path(path) / MODEL_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(
            "there is no tokenizer", field="tokenizer.path", value=str(file), remedy="make one: lmscale tokenizer train"
        )
    return file


def hash_hf_files(path: str | Path) -> str:
    """Hash the files of a directory that define an HF tokenizer; copies of it elsewhere hash alike.

    Raises:
        DataError: if the directory holds none of them.
    """
    files = [Path(path) / name for name in HF_FILES if (Path(path) / name).is_file()]
    if not files:
        raise DataError("is no directory with a tokenizer of transformers", field="tokenizer.path", value=str(path))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()
