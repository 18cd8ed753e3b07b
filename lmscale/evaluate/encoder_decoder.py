"""A trained encoder-decoder (bart, t5) in Python: write what follows from a text, and score it.

Shapes: b texts, s tokens of the encoder, d tokens of the decoder, h hidden.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lmscale import batch as fields
from lmscale.errors import ConfigError
from lmscale.evaluate.batches import Padded, check_sequences, pad_right
from lmscale.evaluate.marks import encode_marked, fill_spans, marks_of
from lmscale.evaluate.model import DEFAULT_NEW_TOKENS, Adapters, IsEnd, Prompts, Score, TrainedModel, cached, scores_of
from lmscale.evaluate.sampling import Sampler, Sampling


class EncoderDecoderModel(TrainedModel):
    """An encoder and a decoder in eval mode. Made by `lmscale.evaluate.inference.load`.

    What the two read begins and ends as in training:
        bart: the encoder, bos text eos; the decoder, eos bos and then what it has written. In training bos always
            follows eos there, and so it is given, not chosen: where a published checkpoint's config says
            forced_bos_token_id, transformers does the same.
        t5: the encoder, text eos; the decoder, pad and then what it has written.
    Gaps of a text are written <mask> (bart; as the tokenizer spells it) or <extra_id_0>, <extra_id_1>, ... (t5).
    """

    # -- writing ---------------------------------------------------------------------------------------------------

    def generate(  # type: ignore[override]
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_eos: bool = True,
        adapters: Adapters = None,
    ) -> list[str]:
        """Write what the decoder makes of each prompt.

        Args:
            prompts: a text, texts, token ids, or lists of them; ids without the special tokens at the ends.
            max_new_tokens: for each prompt; left out, 128 or what there is of positions.
            temperature: 0 is greedy.
            top_k: draw among the k likeliest tokens.
            top_p: draw among the fewest likeliest tokens whose probabilities add up to it.
            seed: equal seeds, equal text.
            stop_at_eos: end a text where the model ends it.
            adapters: the adaptation of each prompt by its name, None for the base, or one for all; of those that `load`
                was given.

        Returns:
            The decoder's texts, without the prompts; where a prompt holds sentinels, the prompt with what the decoder
            wrote for each in its place.

        Raises:
            ConfigError: before anything is computed: if a prompt is longer than model.max_position_embeddings, or an
                option is out of range.
        """
        ids = self.encode(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        with self.using(adapters, len(ids)):
            new = self.generate_ids(ids, max_new_tokens, sampling, self.special_id("eos") if stop_at_eos else None)
        sentinels = self.tokenizer.sentinel_ids
        rows = zip(ids, new, strict=True)
        filled = [fill_spans(old, out, sentinels) if set(sentinels) & set(old) else out for old, out in rows]
        return [self.decode(row) for row in filled]

    @torch.no_grad()
    def generate_ids(  # type: ignore[override]
        self,
        sources: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
        is_end: IsEnd | None = None,
    ) -> list[list[int]]:
        """Write token ids.

        Args:
            sources: token ids without the special tokens at the ends.
            max_new_tokens: as in `generate`.
            sampling: how tokens are chosen; left out, by the model's own probabilities.
            stop_id: the token that ends a sequence; None lets all go on to the end.
            is_end: tells of a source's new ids whether they end; it may be given more tokens all the same.

        Returns:
            The decoder's new ids for each source, without stop_id and without the tokens that start it.
        """
        if not sources:
            return []
        num_new = self._room(max_new_tokens, len(sources))
        encoder = self._sources(sources)
        start = self._start
        decoder = pad_right([start] * len(sources), self.device)
        hidden = self._encoded(encoder, decoder)
        sampler = Sampler(sampling or Sampling(), self.device)

        def read(tokens: torch.Tensor | None) -> torch.Tensor:
            nonlocal decoder
            if tokens is not None:
                new = tokens[:, None]
                decoder = Padded(new, decoder.positions[:, -1:] + 1, torch.zeros_like(new))
            return self._gathered_logits(self._decoded(hidden, encoder, decoder)[:, -1:]).squeeze(1)

        with cached(self.module, capacity=len(start) + num_new - 1):
            return self._write(read, num_new, sampler, stop_id, is_end)

    def _room(self, max_new_tokens: int | None, num_rows: int) -> int:
        """Return how many tokens are to be written."""
        model, start = self.config.model, self._start
        taken = max(self._prefix_lengths(num_rows))
        if max_new_tokens is None:
            max_new_tokens = DEFAULT_NEW_TOKENS
            if model.position_embedding != "relative":
                max_new_tokens = max(1, min(max_new_tokens, model.max_position_embeddings - taken - len(start)))
        if max_new_tokens < 1:
            raise ConfigError("must be at least 1", field="max_new_tokens", value=max_new_tokens)
        check_sequences([start], model, max_new_tokens, [taken])
        return max_new_tokens

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(  # type: ignore[override]
        self, sources: Prompts, targets: Prompts, batch_size: int = 8
    ) -> list[Score]:
        """Compute the log-likelihood of each token of targets, given its source and the tokens before it.

        Args:
            sources: texts or token ids, as in `generate`, for the encoder.
            targets: texts or token ids for the decoder, as many; the end of the text is not scored, unless its id is
                there.
            batch_size: pairs that are read at a time.

        Raises:
            ConfigError: if the numbers differ, or a text is longer than model.max_position_embeddings.
        """
        pairs = self.encode(sources), self.encode(targets)
        if len(pairs[0]) != len(pairs[1]):
            rule = f"there are {len(pairs[0])} sources"
            raise ConfigError(rule, field="targets", value=len(pairs[1]), remedy="give one target for each source")
        # The last token of a target is not read.
        read, unread = [[*self._start, *ids[:-1]] for ids in pairs[1]], [ids[-1:] for ids in pairs[1] if ids]
        check_sequences(read, self.config.model, taken=self._prefix_lengths(len(read)))
        check_sequences(unread, self.config.model)
        scores: list[Score] = []
        for first in range(0, len(pairs[0]), batch_size):
            scores += self._scores(*(part[first : first + batch_size] for part in pairs))
        return scores

    def _scores(self, sources: Sequence[list[int]], targets: Sequence[list[int]]) -> list[Score]:
        encoder, start = self._sources(sources), self._start
        skipped = len(start) - 1
        whole = pad_right([[*start, *ids] for ids in targets], self.device)
        if whole.tokens.size(1) == len(start):
            return [Score([], [], []) for _ in targets]
        decoder = whole.without_last()
        hidden = self._decoded(self._encoded(encoder, decoder), encoder, decoder)[:, skipped:]
        labels = whole.tokens[:, len(start) :]
        found = scores_of(self._gathered_logits, hidden, labels, self.config.model.padded_vocab_size)
        values, are_likeliest = (tensor.tolist() for tensor in found)
        rows = zip(targets, values, are_likeliest, strict=True)
        return [Score(list(ids), row[: len(ids)], likeliest[: len(ids)]) for ids, row, likeliest in rows]

    @torch.no_grad()
    def logits(
        self,
        tokens: torch.Tensor,
        decoder_tokens: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        decoder_document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits of all that the decoder reads.

        Args:
            tokens: int64 [b, s], of the encoder, special tokens included.
            decoder_tokens: int64 [b, d], special tokens included.
            document_ids: int64 [b, s], -1 where there is padding; left out, there is none.
            decoder_document_ids: int64 [b, d], alike.

        Returns:
            fp32 [b, d, vocab_size], on every rank.
        """
        encoder = _record(tokens, document_ids, self.device)
        decoder = _record(decoder_tokens, decoder_document_ids, self.device)
        return self._gathered_logits(self._decoded(self._encoded(encoder, decoder), encoder, decoder))

    # -- the two stacks --------------------------------------------------------------------------------------------

    @property
    def _start(self) -> list[int]:
        """What the decoder reads before the first token that it chooses."""
        if self.config.model.architecture == "t5":
            return [self.special_id("pad")]
        return [self.special_id("eos"), self.special_id("bos")]

    def _sources(self, sources: Sequence[Sequence[int]]) -> Padded:
        """Check texts and put them between the encoder's special tokens, as a batch."""
        first = [] if self.config.model.architecture == "t5" else [self.special_id("bos")]
        sequences = [[*first, *ids, self.special_id("eos")] for ids in sources]
        check_sequences(sequences, self.config.model, taken=self._taken(len(sequences)))
        return pad_right(sequences, self.device, self.tokenizer.pad_id or 0)

    def _encoded(self, encoder: Padded, decoder: Padded) -> torch.Tensor:
        """Run the encoder: [b, s, h]. What the decoder reads passes by."""
        hidden: torch.Tensor = self.module.encode(self._both(encoder.tokens, encoder, decoder))[0]
        return hidden

    def _decoded(self, hidden: torch.Tensor, encoder: Padded, decoder: Padded) -> torch.Tensor:
        """Run the decoder on the encoder's output: final hidden states [b, d, h]."""
        out: torch.Tensor = self.module.decode(self._both(hidden, encoder, decoder))[0]
        return out

    def _both(self, entering: torch.Tensor, encoder: Padded, decoder: Padded) -> tuple[torch.Tensor, ...]:
        found = self._with_prompts(
            {
                fields.TOKENS.name: encoder.tokens,
                fields.DOCUMENT_IDS.name: encoder.document_ids,
                fields.POSITIONS.name: encoder.positions,
            }
        )
        if entering is not encoder.tokens:
            found[fields.TOKENS.name] = entering
        return self._packed(
            **found,
            **{
                fields.DECODER_TOKENS.name: decoder.tokens,
                fields.DECODER_DOCUMENT_IDS.name: decoder.document_ids,
                fields.DECODER_POSITIONS.name: decoder.positions,
            },
        )

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return encode_marked(self.tokenizer, texts, marks_of(self.tokenizer))


def _record(tokens: torch.Tensor, document_ids: torch.Tensor | None, device: torch.device) -> Padded:
    positions = torch.arange(tokens.size(1)).expand_as(tokens)
    ids = torch.zeros_like(tokens) if document_ids is None else document_ids
    return Padded(*(tensor.to(device) for tensor in (tokens, positions, ids)))
