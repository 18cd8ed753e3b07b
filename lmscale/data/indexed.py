"""A tokenized corpus on disk, opened and checked."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.data.index_file import bin_path, idx_path, read_index
from lmscale.data.manifest import PAIRS, Manifest, read_manifest, sha256_of_file
from lmscale.data.shards import ShardedTokens, list_path, open_shards, read_shards
from lmscale.data.tokenizer import padded_sizes
from lmscale.errors import DataError

_BLOCK_BYTES = 4096
_NUM_BLOCKS = 256
_NUM_LOOKED_AT = 1000


class IndexedCorpus:
    """The documents of PREFIX.bin and PREFIX.idx, memory-mapped, or of the shards that PREFIX.shards.json lists.

    Opening checks the whole index against the size of the .bin, and reads no token. A copy in another process (pickle,
    as data loader workers make it) opens the files again instead of carrying their content.

    Attributes:
        prefix: as given.
        tokens: flat memory map of all tokens, in the dtype of the file, not to be written.
        document_offsets: int64 [num_documents + 1], the first token of each document, and the end.
        sentence_offsets: int64 [num_sentences + 1], the first token of each sentence, and the end; where the corpus has
            no sentences, each document is one.
        document_sentences: int64 [num_documents + 1], the first sentence of each document, and the end.

    Raises:
        DataError: naming the file that is missing, empty, truncated or foreign.
    """

    def __init__(self, prefix: str | Path):
        self.prefix = str(prefix)
        # Where both are there, the single files are read: a list is looked for in their absence.
        self._shards = read_shards(prefix) if _is_in_shards(prefix) else None
        self.tokens: NDArray[np.integer[Any]] | ShardedTokens
        if self._shards is not None:
            index, self.tokens = open_shards(prefix, self._shards)
        else:
            index = read_index(prefix)
            self.tokens = np.memmap(bin_path(prefix), index.dtype, "r")
        self.document_offsets = index.document_offsets
        self.sentence_offsets, self.document_sentences = index.sentence_offsets, index.document_sentences

    def __reduce__(self) -> tuple[type[IndexedCorpus], tuple[str]]:
        return IndexedCorpus, (self.prefix,)

    @property
    def num_documents(self) -> int:
        """Documents of the corpus."""
        return len(self.document_offsets) - 1

    @property
    def num_sentences(self) -> int:
        """Sentences of the corpus; as many as documents where it has none."""
        return len(self.sentence_offsets) - 1

    @property
    def has_sentences(self) -> bool:
        """Whether documents are divided into sentences."""
        told = self.manifest is not None and self.manifest.sentences is not None
        return told or self.num_sentences > self.num_documents

    @cached_property
    def has_pairs(self) -> bool:
        """Whether each document is an input and a target: by the manifest, or by there being two sequences in each."""
        if self.manifest is not None:
            return self.manifest.sentences == PAIRS
        return bool((np.diff(self.document_sentences) == 2).all())

    @property
    def num_tokens(self) -> int:
        """Tokens of the corpus, document ends included."""
        return len(self.tokens)

    def document(self, number: int) -> NDArray[np.integer[Any]]:
        """Return the tokens of one document, its end included: a view, but where it crosses shards."""
        return self.tokens[self.document_offsets[number] : self.document_offsets[number + 1]]

    @cached_property
    def idx_sha256(self) -> str:
        """SHA-256 of the .idx; of a corpus in shards, that of theirs together."""
        if self._shards is not None:
            return self._shards.manifest.idx_sha256
        return sha256_of_file(idx_path(self.prefix))

    @cached_property
    def content_hash(self) -> str:
        """Identify the content: SHA-256 of the whole .idx and of 256 blocks of 4 KiB spread over the .bin.

        A rebuilt corpus differs; a few bytes changed in place between the blocks do not show.
        """
        digest = hashlib.sha256(self.idx_sha256.encode())
        content = self.tokens.view(np.uint8)
        last = max(0, len(content) - _BLOCK_BYTES)
        for start in np.unique(np.linspace(0, last, _NUM_BLOCKS).astype(np.int64)):
            digest.update(content[start : start + _BLOCK_BYTES].tobytes())
        return digest.hexdigest()

    @cached_property
    def manifest(self) -> Manifest | None:
        """What `lmscale tokenize` wrote beside the corpus; None for a corpus of another tool."""
        if self._shards is not None:
            return self._shards.manifest
        return read_manifest(self.prefix, self.idx_sha256)

    def rows(self, starts: NDArray[np.int64], width: int) -> NDArray[np.integer[Any]]:
        """Read `width` tokens from each start: int64 [n] -> [n, width]."""
        if isinstance(self.tokens, ShardedTokens):
            return self.tokens[starts[:, None] + np.arange(width)]
        return np.lib.stride_tricks.sliding_window_view(self.tokens, width)[starts]

    def has_document_ends(self, end_id: int | None) -> bool:
        """Tell whether a token that is no text stands behind each document.

        The manifest says so; where there is none, the last tokens of up to 1,000 documents do.

        Args:
            end_id: that token; None where it is not known, which finds none.
        """
        if self.manifest is not None:
            return self.manifest.eos_id is not None
        sample = np.unique(np.linspace(1, self.num_documents, _NUM_LOOKED_AT).astype(np.int64))
        return end_id is not None and bool((self.tokens[self.document_offsets[sample] - 1] == end_id).all())

    def check_vocabulary(self, vocab_size: int, tokenizer_hash: str | None = None, multiple: int = 1) -> None:
        """Check that the corpus is of a model's vocabulary, as far as its manifest tells.

        Without a manifest nothing is known here, and the loader's check of each batch remains.

        Args:
            vocab_size: of the model.
            tokenizer_hash: `content_hash` of the run's tokenizer; None leaves it out.
            multiple: the model's vocabulary may also be the tokenizer's, rounded up to a multiple of this.

        Raises:
            DataError: if the corpus was made with another vocabulary.
        """
        manifest = self.manifest
        if manifest is None:
            return
        if vocab_size not in padded_sizes(manifest.vocab_size, multiple):
            raise DataError(
                f"was tokenized with a vocabulary of {manifest.vocab_size}, and model.vocab_size is {vocab_size}",
                field=self.prefix,
                remedy=f"set model.vocab_size={manifest.vocab_size}, or tokenize again",
            )
        if tokenizer_hash is not None and manifest.tokenizer_hash != tokenizer_hash:
            raise DataError(
                "was tokenized with another tokenizer than tokenizer.path",
                field=self.prefix,
                remedy="set tokenizer.path to the one that made it, or tokenize again",
            )


def _is_in_shards(prefix: str | Path) -> bool:
    return not idx_path(prefix).exists() and list_path(prefix).exists()
