"""A sentencepiece model of ours as the tokenizer.json that AutoTokenizer reads; transformers is not needed to write it.

Ids and pieces are the same. What transformers does otherwise: it finds special tokens in text, where lmscale spells them,
and reads the character U+2581 as a space.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_SPACE, _SPACE_MARK = " ", "\u2581"
_NEVER = -1.0e6
"""Score of pieces that text is not made of: the spelling in any other pieces is likelier."""
_NAMES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "unk": "<unk>", "mask": "<mask>", "cls": "<cls>", "sep": "<sep>"}
_TEMPLATES = {
    "bert": ("<cls> A0 <sep>", "<cls> A0 <sep> B1 <sep>1"),
    "roberta": ("<s> A0 </s>", "<s> A0 </s> </s> B0 </s>"),
    "bart": ("<s> A0 </s>", "<s> A0 </s> </s> B0 </s>"),
    "t5": ("A0 </s>", "A0 </s> B0 </s>"),
}
"""What is put around one text and around two, by architecture; the digit is the token type."""


def write_hf_tokenizer(model_file: Path, directory: Path, architecture: str) -> bool:
    """Write tokenizer.json and tokenizer_config.json.

    Args:
        model_file: of `lmscale tokenizer train`; or of others, if it changes no text either.
        directory: where to write.
        architecture: of the model, which says what special ids stand around a text.

    Returns:
        Whether it could: False, and nothing written, for a model that normalizes text.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2
    model = proto.ModelProto.FromString(model_file.read_bytes())
    normalizer, kind = model.normalizer_spec, proto.TrainerSpec.ModelType.Name(model.trainer_spec.model_type)
    changes_text = normalizer.name != "identity" or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
    if changes_text or kind == "WORD" or model.trainer_spec.treat_whitespace_as_suffix:
        return False
    types = proto.ModelProto.SentencePiece.Type
    special = [index for index, piece in enumerate(model.pieces) if piece.type in (types.CONTROL, types.UNKNOWN)]
    added = [{"id": index, "content": model.pieces[index].piece, "special": True, **_EXACT} for index in special]
    ids = {piece.piece: index for index, piece in enumerate(model.pieces)}
    keys = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": _SPACE}, "content": _SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": _template(architecture, ids),
        "decoder": {"type": "Sequence", "decoders": _DECODERS},
        "model": _unigram(model, types) if kind == "UNIGRAM" else _bpe(model, types, kind == "BPE"),
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": token for name, token in _NAMES.items() if token in ids},
    }
    (directory / "tokenizer.json").write_text(json.dumps(keys, ensure_ascii=False), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return True


_EXACT = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_DECODERS = [
    {"type": "Replace", "pattern": {"String": _SPACE_MARK}, "content": _SPACE},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]


def _unigram(model: Any, types: Any) -> dict[str, Any]:
    vocabulary = [[piece.piece, piece.score if piece.type == types.NORMAL else _NEVER] for piece in model.pieces]
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": vocabulary,
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _bpe(model: Any, types: Any, merges: bool) -> dict[str, Any]:
    """Write a BPE model, or without merges one of characters."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": _NAMES["unk"],
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.piece: index for index, piece in enumerate(model.pieces)},
        "merges": _merges(model, types) if merges else [],
    }


def _merges(model: Any, types: Any) -> list[tuple[str, str]]:
    """List the pairs that make each piece, the likeliest piece first: sentencepiece keeps the pieces alone."""
    ids = {piece.piece: index for index, piece in enumerate(model.pieces) if piece.type == types.NORMAL}
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece in ids:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-model.pieces[ids[piece]].score, ids[left], ids[right], (left, right)))
    return [pair for *_, pair in sorted(found, key=lambda one: one[:3])]


def _template(architecture: str, ids: dict[str, int]) -> dict[str, Any] | None:
    """Write what is put around texts; nothing where the tokenizer lacks one of the tokens."""
    single, pair = _TEMPLATES.get(architecture, ("", ""))
    tokens = {word.rstrip("01") for word in f"{single} {pair}".split()} - {"A", "B"}
    if not tokens or not tokens <= ids.keys():
        return None
    return {
        "type": "TemplateProcessing",
        "single": [_place(word) for word in single.split()],
        "pair": [_place(word) for word in pair.split()],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in sorted(tokens)},
    }


def _place(word: str) -> dict[str, Any]:
    name = word.rstrip("01")
    return {"Sequence" if name in "AB" else "SpecialToken": {"id": name, "type_id": int(word[len(name) :] or 0)}}
