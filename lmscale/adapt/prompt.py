"""Prompt tuning: trained vectors in the place of the word embeddings of some tokens.

Shapes: k vectors; hidden states [b, s, h] before sequence parallelism splits them, so that every tensor-parallel rank
computes the same and has the whole gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from lmscale.adapt.parameters import parameter, zeros
from lmscale.adapt.specs import edit_input
from lmscale.config.adapt import PromptTuningConfig
from lmscale.models.context import ModelContext
from lmscale.models.embedding import InputEmbedding
from lmscale.models.initialization import Fill
from lmscale.models.specs import NamedSpecs
from lmscale.parallel.seeds import hash_seed

MOST_FREQUENT = 5000
"""Tokens that vocabulary draws from."""


def prompt_specs(specs: NamedSpecs, context: ModelContext, adapt: PromptTuningConfig) -> NamedSpecs:
    """Put a prompt into the first input embedding."""
    return edit_input(specs, functools.partial(_put_into, context=context, adapt=adapt))


def _put_into(embedding: InputEmbedding, context: ModelContext, adapt: PromptTuningConfig) -> None:
    embedding.prompt = Prompt(context, adapt, f"{embedding.key}.prompt")


class Prompt(nn.Module):
    """A table of vectors that stand in the place of word embeddings; positions and token types are added to them too.

    Drawn from U[-c, c] (uniform_sym) or U[0, c) (uniform_pos); 0 where the base's embeddings will fill it
    (train.initial).

    Shapes: table [k, h]; of several adaptations [N, k, h].

    Source: Lester et al. 2021, arXiv:2104.08691, sec. 2 and 3.2.
    """

    def __init__(self, context: ModelContext, adapt: PromptTuningConfig, key: str):
        super().__init__()
        self._context, self._length = context, adapt.length
        with context.weights.layer(key):
            shape = (adapt.length, context.model.hidden_size)
            self.table = parameter(context, shape, _fill(context, adapt), entries=adapt.entries)

    def forward(self, hidden: torch.Tensor, prompt_places: torch.Tensor) -> torch.Tensor:
        """Put vector prompt_places [b, s] in the place of hidden [b, s, h], wherever it is at least 0."""
        places = prompt_places.clamp(min=0)
        if self._context.rows.ids is not None:
            places = places + self._length * self._context.rows.ids[:, None]
        vectors = F.embedding(places, self.table.flatten(0, -2)).to(hidden.dtype)
        return torch.where((prompt_places >= 0)[..., None], vectors, hidden)


def _fill(context: ModelContext, adapt: PromptTuningConfig) -> Fill:
    scale = adapt.init_scale
    if adapt.init == "uniform_sym":
        return context.weights.uniform(scale)
    if adapt.init == "uniform_pos":
        draw = context.weights.uniform(scale / 2)
        return lambda tensor: draw(tensor).add_(scale / 2)
    return zeros


def frequent_ids(counts: NDArray[np.int64] | None, special_ids: Sequence[int], vocab_size: int) -> NDArray[np.int64]:
    """List the tokens that vocabulary draws from, the most frequent first: 5,000, or as many as there are.

    Args:
        counts: int64 [v], how often each token stands in the training text; None takes them in the order of their ids,
            which in the vocabularies of unigram and bpe tokenizers is about that of their frequency.
        special_ids: left out.
        vocab_size: of the tokenizer.
    """
    if counts is None:
        order = np.arange(vocab_size)
    else:
        order = np.argsort(-counts[:vocab_size], kind="stable")
        order = order[counts[order] > 0]
    return order[~np.isin(order, np.asarray(special_ids, np.int64))][:MOST_FREQUENT].astype(np.int64)


Pieces = list[list[int]]
"""For each vector of a prompt, the tokens whose embeddings it is the mean of."""


def pieces_of_vectors(
    adapt: PromptTuningConfig,
    seed: int,
    candidates: NDArray[np.int64],
    labels: Sequence[Sequence[int]] = (),
    text: Sequence[int] = (),
) -> list[Pieces]:
    """Choose the tokens that the vectors of each adaptation's prompt begin as.

    Args:
        adapt: the method, of init vocabulary, labels or text.
        seed: of the run.
        candidates: int64, what vocabulary draws from (`frequent_ids`): without replacement while there are enough.
        labels: the tokens of each label word, read with init: labels; the vectors behind them are drawn as vocabulary's.
        text: the tokens of init_text, read with init: text; repeated or cut to k.

    Returns:
        N times k lists of tokens.

    Source: Lester et al. 2021, arXiv:2104.08691, sec. 3.2.
    """
    length = adapt.length
    if adapt.init == "text":
        return [[[text[place % len(text)]] for place in range(length)] for _ in range(adapt.entries)]
    first: Pieces = [list(pieces) for pieces in labels][:length] if adapt.init == "labels" else []
    chosen = []
    for entry in range(adapt.entries):
        generator = np.random.default_rng(hash_seed("prompt", seed, entry))
        count = length - len(first)
        drawn = generator.choice(candidates, count, replace=count > len(candidates)) if count else candidates[:0]
        chosen.append([*first, *([int(token)] for token in drawn)])
    return chosen


def mean_embeddings(pieces: list[Pieces], table: torch.Tensor) -> torch.Tensor:
    """Average the rows of a word table [v, h] for each vector: [k, h], or [N, k, h] of several adaptations."""
    made = torch.stack([torch.stack([table[tokens].mean(dim=0) for tokens in entry]) for entry in pieces])
    return made if len(pieces) > 1 else made[0]
