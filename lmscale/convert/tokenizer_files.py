"""Tokenizers as files: what is copied, how many entries they have, which special ids. transformers is not needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lmscale.convert.hf_config import FILE as CONFIG
from lmscale.convert.hf_config import read_json
from lmscale.data.tokenizer import HF_FILES, NUM_SENTINELS
from lmscale.errors import ConversionError

_COPIED = (*HF_FILES, "chat_template.jinja")
_SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")
SPECIAL = ("bos", "eos", "pad")
_IDS = (
    *(f"{name}_token_id" for name in SPECIAL),
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
)


def copy_from_hf(source: Path, target: Path, hf: dict[str, Any]) -> bool:
    """Copy a directory's tokenizer, if it has one.

    With it goes a small config.json: AutoTokenizer asks it for the class where tokenizer_config.json names none, and it
    keeps the special ids for the way back.

    Returns:
        Whether there was one.
    """
    files = [source / name for name in _COPIED if (source / name).is_file()]
    if not any(file.name in HF_FILES for file in files):
        return False
    target.mkdir()
    for file in files:
        shutil.copyfile(file, target / file.name)
    kept = {key: hf[key] for key in ("model_type", *_IDS) if key in hf}
    (target / CONFIG).write_text(json.dumps(kept, indent=2) + "\n")
    return True


def copy_to_hf(source: Path, target: Path) -> None:
    """Copy a checkpoint's tokenizer of type hf into a directory that has its own config.json."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(CONFIG), dirs_exist_ok=True)


def count_entries(directory: Path) -> int | None:
    """Count a tokenizer's ids, added ones included: one more than the largest; None where no file tells.

    Raises:
        ConversionError: if a file cannot be read.
    """
    ids = set(_vocabulary(directory).values())
    return max(ids) + 1 if ids else None


def special_ids(directory: Path) -> dict[str, Any]:
    """Find the special ids of a tokenizer: those of the config.json that came with it, else those of its tokens.

    Returns:
        bos_token_id, eos_token_id and pad_token_id, None where there is none; others as they were.
    """
    names: dict[str, Any] = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        names |= read_json(directory / file) if (directory / file).is_file() else {}
    vocabulary = _vocabulary(directory)
    found: dict[str, Any] = {}
    for name in SPECIAL:
        token = names.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        found[f"{name}_token_id"] = vocabulary.get(token) if token is not None else None
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    return found | {key: config[key] for key in _IDS if key in config}


def _vocabulary(directory: Path) -> dict[str, int]:
    """Read the tokens and their ids, from the file that says most."""
    try:
        return _read_vocabulary(directory)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        raise ConversionError(f"the tokenizer's files cannot be read: {error!r}", field=str(directory)) from None


def _read_vocabulary(directory: Path) -> dict[str, int]:
    added = _added(directory)
    if (directory / "tokenizer.json").is_file():
        keys = read_json(directory / "tokenizer.json")
        entries = keys["model"]["vocab"]
        if isinstance(entries, list):
            entries = _numbered(piece for piece, _ in entries)
        return {**entries, **added, **{token["content"]: token["id"] for token in keys.get("added_tokens", ())}}
    if (directory / "vocab.json").is_file():
        return read_json(directory / "vocab.json") | added
    if (directory / "vocab.txt").is_file():
        return _numbered((directory / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]) | added
    for name in _SENTENCEPIECE:
        if (directory / name).is_file():
            return _sentencepiece(directory / name) | added
    return added


def _numbered(tokens: Iterable[str]) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def _added(directory: Path) -> dict[str, int]:
    added = read_json(directory / "added_tokens.json") if (directory / "added_tokens.json").is_file() else {}
    config = read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    decoder = config.get("added_tokens_decoder", {})
    return {**added, **{token["content"]: int(number) for number, token in decoder.items()}}


def _sentencepiece(file: Path) -> dict[str, int]:
    """Read the pieces; T5's tokenizer adds its sentinels to them by itself, the first one last."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [processor.id_to_piece(number) for number in range(processor.vocab_size())]
    if file.name == "spiece.model" and "<extra_id_0>" not in pieces:
        pieces += [f"<extra_id_{number}>" for number in reversed(range(NUM_SENTINELS))]
    return _numbered(pieces)
