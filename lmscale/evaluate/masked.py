"""A trained encoder (bert, roberta) in Python: fill masks.

Shapes: b texts, s tokens, l masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lmscale import batch as fields
from lmscale.errors import ConfigError
from lmscale.evaluate.batches import check_sequences, pad_right
from lmscale.evaluate.marks import encode_marked
from lmscale.evaluate.model import Adapters, Prompts, TrainedModel
from lmscale.evaluate.sampling import Sampler, Sampling

DEFAULT_CANDIDATES = 5


@dataclass(frozen=True)
class Candidate:
    """A token for a mask."""

    token_id: int
    text: str
    probability: float


class MaskedModel(TrainedModel):
    """An encoder in eval mode, which predicts masked tokens. Made by `lmscale.evaluate.inference.load`.

    Masks are written as the tokenizer spells them: <mask> for sentencepiece, [MASK] in many a tokenizer of BERT's. A
    text is read between the special tokens of its objective: cls and sep (bert), bos and eos (roberta). All masks of a
    text are predicted at once, each as if it were the only one to be chosen.
    """

    def generate(  # type: ignore[override]
        self,
        prompts: Prompts,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        adapters: Adapters = None,
    ) -> list[str]:
        """Fill the masks of prompts.

        Args:
            prompts: a text, texts, token ids, or lists of them; ids without the special tokens at the ends.
            temperature: 0, the default, takes the likeliest token for each mask.
            top_k: draw among the k likeliest tokens.
            top_p: draw among the fewest likeliest tokens whose probabilities add up to it.
            seed: equal seeds, equal text.
            adapters: the adaptation of each prompt by its name, None for the base, or one for all; of those that `load`
                was given.

        Returns:
            Each prompt with its masks filled.

        Raises:
            ConfigError: before anything is computed: if a prompt holds no mask or is longer than
                model.max_position_embeddings, or an option is out of range.
        """
        sampler = Sampler(Sampling(temperature, top_k, top_p, seed), self.device)
        rows = self.encode(prompts)
        if not rows:
            return []
        places = [self._places(ids) for ids in rows]
        with self.using(adapters, len(rows)):
            logits = self._masked_logits(rows, places)
        chosen = iter(self._agreed(sampler(logits)).tolist())
        for ids, gaps in zip(rows, places, strict=True):
            for place in gaps:
                ids[place] = next(chosen)
        return [self.decode(ids) for ids in rows]

    def fill(  # type: ignore[override]
        self, text: str | Sequence[int], top_k: int = DEFAULT_CANDIDATES
    ) -> list[list[Candidate]]:
        """Propose tokens for the masks of a text.

        Args:
            text: a text, or token ids without the special tokens at the ends.
            top_k: candidates for each mask.

        Returns:
            For each mask, in order, the top_k likeliest tokens, the likeliest first.

        Raises:
            ConfigError: as `generate` does.
        """
        if top_k < 1:
            raise ConfigError("must be at least 1", field="top_k", value=top_k)
        rows = self.encode(text)
        logits = self._masked_logits(rows, [self._places(ids) for ids in rows])
        probabilities, ids = logits.softmax(dim=-1).topk(min(top_k, logits.size(-1)), dim=-1)
        return [
            [Candidate(token, self.decode([token]), share) for token, share in zip(*row, strict=True)]
            for row in zip(ids.tolist(), probabilities.tolist(), strict=True)
        ]

    @torch.no_grad()
    def logits(
        self,
        tokens: torch.Tensor,
        masked_positions: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        token_types: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits.

        Args:
            tokens: int64 [b, s], special tokens included.
            masked_positions: int64 [b, l], the places to predict.
            document_ids: int64 [b, s], -1 where there is padding; left out, there is none.
            token_types: int64 [b, s]; left out, 0.

        Returns:
            fp32 [b, l, vocab_size], on every rank.
        """
        found = {
            fields.TOKENS.name: tokens,
            fields.DOCUMENT_IDS.name: torch.zeros_like(tokens) if document_ids is None else document_ids,
            fields.MASKED_POSITIONS.name: masked_positions,
            fields.TOKEN_TYPES.name: torch.zeros_like(tokens) if token_types is None else token_types,
        }
        out = self.module(self._packed(**self._with_prompts(found)))
        return self._gathered(out[0] if isinstance(out, tuple) else out)

    def _masked_logits(self, rows: Sequence[Sequence[int]], places: Sequence[Sequence[int]]) -> torch.Tensor:
        """Read texts between their special tokens: the logits of all masks, one behind the other, [masks, vocab_size]."""
        ends = ("cls", "sep") if self.config.model.architecture == "bert" else ("bos", "eos")
        first, last = (self.special_id(name) for name in ends)
        sequences = [[first, *ids, last] for ids in rows]
        check_sequences(sequences, self.config.model, taken=self._taken(len(sequences)))
        padded = pad_right(sequences, self.device, self.tokenizer.pad_id or 0)
        gaps = pad_right(places, self.device)
        logits = self.logits(padded.tokens, gaps.tokens + 1, padded.document_ids)
        return logits[gaps.document_ids == 0]

    def _places(self, ids: Sequence[int]) -> list[int]:
        """Find the masks."""
        mask_id = self.special_id("mask")
        places = [place for place, token in enumerate(ids) if token == mask_id]
        if not places:
            mark = self.tokenizer.mask_text or "its mask"
            raise ConfigError("holds no mask", field="text", remedy=f"write {mark} where a token is to be found")
        return places

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        mark, mask_id = self.tokenizer.mask_text, self.special_id("mask")
        return encode_marked(self.tokenizer, texts, {mark: mask_id} if mark is not None else {})
