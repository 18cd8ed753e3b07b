"""PREFIX.json, which says what a tokenized corpus was made with. Corpora of other tools have none."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

PAIRS = "pairs"
"""In the place of a way to find sentences: each document is an input and a target."""


@dataclass(frozen=True)
class Manifest:
    """What `lmscale tokenize` writes beside the corpus."""

    tokenizer_hash: str
    """`content_hash` of the tokenizer."""
    vocab_size: int
    """Of the tokenizer, special ids included."""
    eos_id: int | None
    """The id behind each document; None where none was appended."""
    documents: int
    tokens: int
    """Document ends included."""
    skipped: dict[str, int]
    """Records left out, by reason."""
    idx_sha256: str
    """Of the .idx that this belongs to."""
    bin_bytes: int
    sentences: str | None = None
    """How documents were divided: into sentences by split or lines, or into pairs; None where each is one sequence."""
    made_from: str | None = None
    """Of a shard: what tells its inputs and how they were read, so that a rerun knows whether it is done."""

    def to_json(self) -> str:
        """Render as the content of the file."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"


def manifest_path(prefix: str | Path) -> Path:
    """Name the file."""
    return Path(f"{prefix}.json")


def read_manifest(prefix: str | Path, idx_sha256: str) -> Manifest | None:
    """Read the manifest of a corpus; None where there is none, or it is of a former index at the same prefix."""
    try:
        manifest = Manifest(**json.loads(manifest_path(prefix).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return manifest if manifest.idx_sha256 == idx_sha256 else None


def sha256_of_file(path: Path) -> str:
    """Hash a file without holding it in memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
