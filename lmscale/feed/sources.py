"""The sources of a run, opened and checked. No torch here: the launcher opens them before any rank starts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from lmscale.config.data import split_shares
from lmscale.config.run import RunConfig
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.part import Part
from lmscale.data.source import Source, build_source
from lmscale.data.tokenizer import tokenizer_hash
from lmscale.data.windows import split_documents
from lmscale.feed.vocabulary import vocabulary_multiple

_TRAIN, _VALID = 0, 1


def open_train(config: RunConfig, end_id: int | None = None) -> list[Source]:
    """Open the training part of each source of the blend.

    Args:
        config: the run.
        end_id: the token that ends documents, for corpora without a manifest; None where it is not known.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    shares = split_shares(config.data.split)
    sources = []
    for number, source in enumerate(config.data.train):
        corpus = _open(config, source.prefix)
        documents = split_documents(corpus.num_documents, shares)[_TRAIN]
        sources.append(_cut(config, Part(corpus, documents, "the train share", end_id), number))
    return sources


def open_held_out(config: RunConfig, end_id: int | None = None) -> dict[str, Source]:
    """Open the held-out corpora by their names in the metrics.

    They are data.valid, or, where that is empty, the valid share of each training source under the base name of its
    prefix.

    Args:
        config: the run.
        end_id: as of `open_train`.

    Raises:
        DataError: if a corpus cannot be used, or is of another vocabulary.
    """
    if config.data.valid:
        return {v.name: open_whole(config, v.prefix, end_id) for v in config.data.valid}
    shares = split_shares(config.data.split)
    if shares[_VALID] == 0:
        return {}
    prefixes = [source.prefix for source in config.data.train]
    held_out = {}
    for name, prefix in zip(_base_names(prefixes), prefixes, strict=True):
        corpus = _open(config, prefix)
        documents = split_documents(corpus.num_documents, shares)[_VALID]
        held_out[name] = _cut(config, Part(corpus, documents, "the valid share", end_id))
    return held_out


def open_whole(config: RunConfig, prefix: str, end_id: int | None = None) -> Source:
    """Open all of a corpus as the run cuts its own."""
    return _cut(config, Part(_open(config, prefix), end_id=end_id))


def _base_names(prefixes: list[str]) -> list[str]:
    """Name corpora by the last part of their prefix, numbered where that is not unique."""
    names = [Path(prefix).name for prefix in prefixes]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}-{number}" for number, name in enumerate(names)]


def _open(config: RunConfig, prefix: str) -> IndexedCorpus:
    corpus = IndexedCorpus(prefix)
    known = tokenizer_hash(config.tokenizer) if config.tokenizer is not None else None
    corpus.check_vocabulary(config.model.vocab_size, known, vocabulary_multiple(config.objective))
    return corpus


def _cut(config: RunConfig, part: Part, number: int = 0) -> Source:
    return build_source(
        config.objective, config.text_lengths, part, config.train.seed, number, config.data.reset_attention_mask
    )
