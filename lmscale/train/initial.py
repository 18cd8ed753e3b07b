"""Initial values of adaptations that are taken from the base: embeddings of tokens, keys and values of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lmscale import batch
from lmscale.adapt.prefix_text import from_text
from lmscale.adapt.prompt import frequent_ids, mean_embeddings, pieces_of_vectors
from lmscale.config.adapt import AdaptConfig, PrefixTuningConfig, PromptTuningConfig
from lmscale.config.data import TokenizerConfig
from lmscale.config.model import ModelConfig
from lmscale.data.tokenizer import Tokenizer, load_tokenizer
from lmscale.errors import ConfigError
from lmscale.models.attention import CoreAttention
from lmscale.plan.adaptation import own_shapes
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader, tp_slice
from lmscale.train.engine import Engine
from lmscale.train.fragments import write_back

_WORDS = "word_embedding.table.weight"


@dataclass(frozen=True)
class Givens:
    """What initial values are made of, besides the base.

    Attributes:
        tokenizer: the run's.
        counts: counts the tokens of the training text, int64 [v]; None where there is none to count.
        labels: the words of a task's labels.
    """

    tokenizer: TokenizerConfig | None = None
    counts: Callable[[], NDArray[np.int64]] | None = None
    labels: Sequence[str] = ()


def initialize(engine: Engine, model: ModelConfig, adapt: AdaptConfig | None, seed: int, givens: Givens) -> None:
    """Give an adaptation the initial values that come from its base; call it once the base is loaded, in a new run only.

    Raises:
        ConfigError: if there is nothing to take them from.
    Collectives: every rank must call.
    """
    if isinstance(adapt, PromptTuningConfig) and adapt.init in ("vocabulary", "labels", "text"):
        table = _prompt(engine, model, adapt, seed, givens)
        fill(engine, dict.fromkeys(own_shapes(model, adapt), table))
    if isinstance(adapt, PrefixTuningConfig) and adapt.init == "text":
        text = _text(adapt, givens)
        tables = observe_text(engine, [text[place % len(text)] for place in range(adapt.length)])
        fill(engine, from_text(tables, model, adapt, engine.context.weights))


@torch.no_grad()
def fill(engine: Engine, tensors: dict[str, torch.Tensor]) -> None:
    """Overwrite trained parameters by whole logical tensors, of which each rank takes its part.

    Collectives: every rank must call.
    """
    topology = engine.topology
    for fragment in engine.fragments():
        tensor = fragment.tensor
        if tensor.name in tensors:
            whole = tensors[tensor.name]
            mine = tp_slice(whole, tensor.tp_dim, tensor.tp_stride, topology.tp_rank, topology.tp_size)
            fragment.master.copy_(mine.reshape(-1)[fragment.start : fragment.end])
    write_back(engine.optimizer, engine.zero_stage)


def _prompt(engine: Engine, model: ModelConfig, adapt: PromptTuningConfig, seed: int, givens: Givens) -> torch.Tensor:
    """Make the vectors, [k, h] or [N, k, h], of the base's embeddings: the same on every rank."""
    tokenizer = load_tokenizer(givens.tokenizer) if givens.tokenizer is not None else None
    text = _text(adapt, givens) if adapt.init == "text" else []
    pieces = pieces_of_vectors(
        adapt, seed, _candidates(model, adapt, tokenizer, givens), _labels(adapt, tokenizer, givens), text
    )
    assert engine.base is not None
    return mean_embeddings(pieces, CheckpointReader(engine.base.path).logical(PARAMETER, _WORDS))


def _candidates(
    model: ModelConfig, adapt: PromptTuningConfig, tokenizer: Tokenizer | None, givens: Givens
) -> NDArray[np.int64]:
    if adapt.init == "text":
        return np.zeros(0, np.int64)
    special = () if tokenizer is None else tuple(tokenizer.special_ids)
    size = model.vocab_size if tokenizer is None else min(tokenizer.vocab_size, model.vocab_size)
    found = frequent_ids(None if givens.counts is None else givens.counts(), special, size)
    if len(found) == 0:
        raise ConfigError(
            "the training text has no token that is not special",
            field="adapt.init",
            value=adapt.init,
            remedy="use another",
        )
    return found


def _labels(adapt: PromptTuningConfig, tokenizer: Tokenizer | None, givens: Givens) -> list[list[int]]:
    if adapt.init != "labels":
        return []
    if tokenizer is None or not givens.labels:
        raise ConfigError(
            "takes the label words of a task, and there are none",
            field="adapt.init",
            value="labels",
            remedy="use vocabulary or text",
        )
    return [pieces for pieces in tokenizer.encode_batch(list(givens.labels)) if pieces]


def _text(adapt: PromptTuningConfig | PrefixTuningConfig, givens: Givens) -> list[int]:
    if givens.tokenizer is None:
        raise ConfigError("is required by adapt.init: text", field="tokenizer", remedy="add the section")
    tokens = load_tokenizer(givens.tokenizer).encode(adapt.init_text or "")
    if not tokens:
        raise ConfigError("has no token", field="adapt.init_text", value=adapt.init_text)
    return tokens


def observe_text(engine: Engine, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Compute the keys and values of a text in every attention of the base: its encoder and its decoder both read it.

    Returns:
        fp32 [p, 2, g, d] of each core attention, by its logical name; keys of rope are rotated. The same on every rank.
    Collectives: every rank must call.
    """
    topology, rows, mine = engine.topology, engine.context.rows, {}
    cores = [module for module in engine.model.modules() if isinstance(module, CoreAttention)]

    def observer(key: str) -> Callable[[torch.Tensor, torch.Tensor], None]:
        def keep(keys: torch.Tensor, values: torch.Tensor) -> None:
            pair = torch.stack((keys[0], values[0])).permute(2, 0, 1, 3)[: len(tokens)]
            mine[key] = topology.tp_rank, pair.float().cpu()

        return keep

    shift = rows.shift
    rows.is_base, rows.shift = True, 0
    for core in cores:
        core.observer = observer(core.key)
    try:
        engine.evaluate(iter([_batch_of(engine, tokens)]), 1)
    finally:
        rows.is_base, rows.shift = False, shift
        for core in cores:
            core.observer = None
    parts: list[dict[str, tuple[int, torch.Tensor]]] = [{} for _ in range(topology.world_size)]
    dist.all_gather_object(parts, mine)
    by_rank: dict[str, dict[int, torch.Tensor]] = {}
    for part in parts:
        for key, (tp_rank, table) in part.items():
            by_rank.setdefault(key, {})[tp_rank] = table
    return {key: torch.cat([tables[rank] for rank in sorted(tables)], dim=2) for key, tables in by_rank.items()}


def _batch_of(engine: Engine, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
    """Make a micro batch of one row that every wire can carry; it is padded to what sequence parallelism can split."""
    context = engine.context
    multiple = context.groups.tp.size() if context.sequence_parallel else 1
    padding = -len(tokens) % multiple
    size = len(tokens) + padding
    row, zeros = torch.tensor([[*tokens, *[0] * padding]]), torch.zeros(1, size, dtype=torch.int64)
    places = torch.arange(size)[None]
    ids = zeros.masked_fill(places >= len(tokens), batch.PADDING_ID)
    none = zeros - 1
    num_labels = size
    if context.head is not None and context.head.kind != "token_classes":
        num_labels = 2 if context.head.kind == "span" else 1
    labels = torch.zeros(1, num_labels, dtype=torch.int64)
    values = {
        batch.TOKENS: row,
        batch.POSITIONS: places,
        batch.DOCUMENT_IDS: ids,
        batch.TOKEN_TYPES: zeros,
        batch.IS_PREFIX: zeros,
        batch.MASKED_POSITIONS: zeros,
        batch.DECODER_TOKENS: row,
        batch.DECODER_POSITIONS: places,
        batch.DECODER_DOCUMENT_IDS: ids,
        batch.PROMPT_PLACES: none,
        batch.ADAPTER_IDS: zeros[:, 0],
        batch.LABELS: labels,
        batch.TARGETS: labels.float(),
        batch.LOSS_MASK: torch.ones(1, num_labels),
        batch.IS_RANDOM_NEXT: none[:, 0],
    }
    return {field.name: value for field, value in values.items()}
