"""What an objective is told of the run's tokenizer: only what it asks for, and that is there. No torch here."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from lmscale.config.objective import BartConfig, BertConfig, ObjectiveConfig, RobertaConfig, T5Config, TextToTextConfig
from lmscale.config.run import RunConfig
from lmscale.data.blocks import Blocks, SentenceBlocks
from lmscale.data.part import Part
from lmscale.data.source import Source
from lmscale.data.tokenizer import Tokenizer, load_tokenizer
from lmscale.errors import DataError
from lmscale.objectives.base import Vocabulary

_ROWS_OF_T5 = 128
_READ_TOKENS = 1 << 18


def vocabulary_multiple(objective: ObjectiveConfig) -> int:
    """Return what the tokenizer's vocabulary may be rounded up to a multiple of, to be the model's.

    The published T5 models have 32,128 rows for 32,100 ids.
    """
    return _ROWS_OF_T5 if isinstance(objective, T5Config | TextToTextConfig) else 1


def build_vocabulary(config: RunConfig) -> Vocabulary:
    """Describe the tokenizer of a run to its objective; causal_lm does without one.

    Raises:
        DataError: if the tokenizer is not there, has more ids than the model, or has not the full stop that bart asks for.
            What else an objective needs, it asks of its vocabulary.
    """
    objective = config.objective
    if config.tokenizer is None or objective.name == "causal_lm":
        return Vocabulary(config.model.vocab_size)
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:  # a mask, or a random token, may be any of its ids
        raise DataError(
            f"the tokenizer {config.tokenizer.path} has {tokenizer.vocab_size} entries",
            field="model.vocab_size",
            value=config.model.vocab_size,
            remedy=f"use model.vocab_size = {tokenizer.vocab_size}",
        )
    return Vocabulary(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        mask_id=tokenizer.mask_id,
        cls_id=tokenizer.cls_id,
        sep_id=tokenizer.sep_id,
        sentinel_ids=tuple(tokenizer.sentinel_ids),
        special_ids=np.array(tokenizer.special_ids, np.int64),
        is_word_start=tokenizer.word_starts() if _reads_words(objective) else None,
        full_stop_id=_full_stop_id(tokenizer, objective, config.tokenizer.path),
    )


def _reads_words(objective: ObjectiveConfig) -> bool:
    if isinstance(objective, BartConfig):
        return objective.masking != "tokens"
    return isinstance(objective, BertConfig | RobertaConfig) and objective.whole_words


def _full_stop_id(tokenizer: Tokenizer, objective: ObjectiveConfig, path: str) -> int | None:
    if not isinstance(objective, BartConfig) or objective.permuted_share == 0:
        return None
    number = tokenizer.piece_id(objective.full_stop)
    if number is None:
        raise DataError(
            f"the tokenizer {path} has no such piece",
            field="objective.full_stop",
            value=objective.full_stop,
            remedy="name the piece that ends its sentences, or set objective.permuted_share to 0",
        )
    return number


def check_full_stop(vocabulary: Vocabulary, objective: ObjectiveConfig, sources: Iterable[Source]) -> None:
    """Check that sentences end where the objective looks for their ends: else it would permute nothing, silently.

    Raises:
        DataError: if a corpus, or the share of it that is read, has no full stop.
    """
    if vocabulary.full_stop_id is None or not isinstance(objective, BartConfig):
        return
    for source in sources:
        assert isinstance(source, Blocks | SentenceBlocks)
        if not _holds(source.part, vocabulary.full_stop_id):
            raise DataError(
                f"{source.part.name} has no full stop, objective.full_stop = {objective.full_stop!r}",
                field=source.corpus.prefix,
                remedy="name the piece that ends its sentences, or set objective.permuted_share to 0",
            )


def _holds(part: Part, token: int) -> bool:
    """Look for a token in a part, from its begin on; only what lacks it is read whole."""
    first, behind = int(part.offsets[0]), int(part.offsets[-1])
    tokens = part.corpus.tokens
    return any(
        bool((tokens[start : min(start + _READ_TOKENS, behind)] == token).any())
        for start in range(first, behind, _READ_TOKENS)
    )
