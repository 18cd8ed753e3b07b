"""A trained model in Python. Of a decoder-only one: write text, score it, look at hidden states.

Shapes: b sequences, s tokens, h hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lmscale import batch as fields
from lmscale.config.checkpoint_paths import resolve_checkpoint
from lmscale.errors import ConfigError
from lmscale.evaluate.adapters import DEFAULT_SLOTS, Shelf, open_table
from lmscale.evaluate.batches import Padded, check_sequences, pad_left
from lmscale.evaluate.encoder_decoder import EncoderDecoderModel
from lmscale.evaluate.loading import build_module, read_config, start_topology
from lmscale.evaluate.masked import MaskedModel
from lmscale.evaluate.model import DEFAULT_NEW_TOKENS, Adapters, IsEnd, Prompts, Score, TrainedModel, cached, scores_of
from lmscale.evaluate.sampling import Sampler, Sampling
from lmscale.models.block import TransformerLayer
from lmscale.models.embedding import FinalNorm, InputEmbedding
from lmscale.train.adapted import check_one, is_adaptation, open_base, stored_adaptation
from lmscale.train.checkpoint_reader import CheckpointReader


def load(
    checkpoint: str | Path,
    device: str | torch.device | None = None,
    precision: str | None = None,
    *,
    base: str | Path | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    slots: int = DEFAULT_SLOTS,
) -> LanguageModel | MaskedModel | EncoderDecoderModel:
    """Load a checkpoint of any layout, to generate and to score.

    One process holds the whole model; ranks started by torchrun or deepspeed share it by tensor parallelism, and all of
    them make the same calls.

    Args:
        checkpoint: a checkpoint's directory, or a run's or its checkpoints/, of which the newest is taken.
        device: where to compute, as in "cpu"; left out, the rank's GPU where there is one.
        precision: fp32, bf16 or fp16; left out, the run's.
        base: of an adaptation: its base's checkpoint; left out, where it was when the adaptation was trained.
        adapters: of a base: checkpoints of adaptations by name, which the rows of a batch may name. They are read when
            they are named first. PATH#N: one of several that stand side by side in a checkpoint, from 0; or #NAME, where
            its task names them.
        slots: adaptations that are in memory at a time.

    Returns:
        A LanguageModel for gpt, a MaskedModel for bert and roberta, an EncoderDecoderModel for bart and t5.

    Raises:
        CheckpointError: if there is no whole checkpoint, or the base is not the adaptation's own.
        ConfigError: if the model does not divide over the ranks, or the device is not there.
    Collectives: every rank must call.
    """
    path = resolve_checkpoint(Path(checkpoint))
    reader, config = CheckpointReader(path), read_config(path)
    topology = start_topology(config, device)
    stored, weights = None, reader
    if is_adaptation(reader):
        stored = stored_adaptation(reader, config)
        check_one(stored)
        weights = open_base(reader, None if base is None else Path(base))
    elif base is not None:
        raise ConfigError("is read with an adaptation only", field="base", value=str(base), remedy="leave it out")
    if adapters is not None and stored is not None:
        raise ConfigError("is an adaptation itself", field="checkpoint", value=str(path), remedy="name its base")
    has_prompts = adapters is not None
    module, context = build_module(weights, config, topology, precision or config.precision, stored, has_prompts)
    kind: type[TrainedModel] = MaskedModel if config.model.is_encoder_only else LanguageModel
    kind = EncoderDecoderModel if config.model.has_decoder_stack else kind
    model = kind(module, context, config) if context.head is None else TrainedModel(module, context, config)
    if adapters is not None:
        model.table = open_table(module, context, Shelf(reader, config.model, adapters), slots)
    return model  # type: ignore[return-value]


class LanguageModel(TrainedModel):
    """A decoder-only model (gpt) in eval mode. Made by `load`.

    A model that was trained with objective.prefix_lm reads a prompt as its prefix, whose tokens see each other; `score`
    and `logits` are causal.
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
        """Continue prompts.

        Args:
            prompts: a text, texts, token ids, or lists of them.
            max_new_tokens: for each prompt; left out, 128 or what the longest prompt leaves of the positions.
            temperature: 0 is greedy.
            top_k: draw among the k likeliest tokens.
            top_p: draw among the fewest likeliest tokens whose probabilities add up to it.
            seed: equal seeds, equal text.
            stop_at_eos: end a text where the model ends the document.
            adapters: the adaptation of each prompt by its name, None for the base, or one for all; of those that `load`
                was given.

        Returns:
            Each prompt with its continuation.

        Raises:
            ConfigError: before anything is computed: if a prompt is empty or, with the new tokens, longer than
                model.max_position_embeddings, or an option is out of range.
        """
        ids = self.encode(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stop_id = self.tokenizer.eos_id if stop_at_eos else None
        with self.using(adapters, len(ids)):
            new = self.generate_ids(ids, max_new_tokens, sampling, stop_id)
        return [self.decode([*before, *after]) for before, after in zip(ids, new, strict=True)]

    @torch.no_grad()
    def generate_ids(  # type: ignore[override]
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
        is_end: IsEnd | None = None,
    ) -> list[list[int]]:
        """Continue token ids: the same without a tokenizer.

        Args:
            prompts: token ids.
            max_new_tokens: as in `generate`.
            sampling: how tokens are chosen; left out, by the model's own probabilities.
            stop_id: the token that ends a sequence; None lets all go on to the end.
            is_end: tells of a prompt's new ids whether they end it; it may be given more tokens all the same.

        Returns:
            The new ids of each prompt, without stop_id.
        """
        if not prompts:
            return []
        num_new = self._room(prompts, max_new_tokens)
        sampler = Sampler(sampling or Sampling(), self.device)
        inputs = pad_left(prompts, self.device)

        def read(tokens: torch.Tensor | None) -> torch.Tensor:
            nonlocal inputs
            inputs = inputs if tokens is None else inputs.after(tokens)
            hidden = self._read(inputs, is_first=tokens is None, is_prefix=tokens is None)
            return self._gathered_logits(hidden[:, -1:]).squeeze(1)

        front = max(self._prompt_lengths(len(prompts)))
        with cached(self.module, capacity=front + inputs.tokens.size(1) + num_new - 1):
            return self._write(read, num_new, sampler, stop_id, is_end)

    def _read(self, inputs: Padded, *, is_first: bool = True, is_prefix: bool = False) -> torch.Tensor:
        """Return final hidden states [b, s, h] of the tokens.

        Args:
            inputs: the tokens.
            is_first: nothing of these sequences was read before; else they go on from what is cached.
            is_prefix: they see each other, where the model was trained to have a prefix.
        """
        found = {fields.TOKENS.name: inputs.tokens, fields.POSITIONS.name: inputs.positions}
        found[fields.DOCUMENT_IDS.name] = inputs.document_ids
        found[fields.IS_PREFIX.name] = torch.full_like(inputs.tokens, int(is_prefix))
        if is_first:
            found = self._with_prompts(found)
        else:
            lengths = torch.tensor(self._prompt_lengths(len(inputs.tokens)), device=self.device)
            found[fields.POSITIONS.name] = inputs.positions + lengths[:, None]
            found[fields.PROMPT_PLACES.name] = torch.full_like(inputs.tokens, -1)
        hidden: torch.Tensor = self.module.trunk(self._packed(**found))[0]
        return hidden[:, -inputs.tokens.size(1) :]

    def _room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None) -> int:
        """Check the prompts and return how many tokens are to be written behind each."""
        taken = self._taken(len(prompts))
        longest = max(used + len(prompt) for used, prompt in zip(taken, prompts, strict=True))
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, self.config.model.max_position_embeddings - longest))
        if max_new_tokens < 1:
            raise ConfigError("must be at least 1", field="max_new_tokens", value=max_new_tokens)
        check_sequences(prompts, self.config.model, max_new_tokens, taken)
        return max_new_tokens

    # -- reading ---------------------------------------------------------------------------------------------------

    def score(self, texts: Prompts, batch_size: int = 8) -> list[Score]:  # type: ignore[override]
        """Compute the log-likelihood of each token of texts, given those before it in its text.

        Args:
            texts: as in `generate`.
            batch_size: texts that are read at a time.

        Raises:
            ConfigError: if a text is empty or longer than model.max_position_embeddings.
        """
        sequences = self.encode(texts)
        check_sequences(sequences, self.config.model, taken=self._taken(len(sequences)))
        return self.score_ids(sequences, batch_size)

    @torch.no_grad()
    def score_ids(self, sequences: Sequence[Sequence[int]], batch_size: int = 8) -> list[Score]:
        """Score token ids as they are: unchecked, and, as the last token is not read, one more than there are positions.

        Args:
            sequences: token ids, none of them empty.
            batch_size: sequences that are read at a time.
        """
        scores = []
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            values, are_likeliest = (tensor.tolist() for tensor in self._scores(pad_left(batch, self.device)))
            for ids, row, likeliest in zip(batch, values, are_likeliest, strict=True):
                padding = len(row) - (len(ids) - 1)
                scores.append(Score(list(ids), row[padding:], likeliest[padding:]))
        return scores

    def _scores(self, inputs: Padded) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute log p(tokens[:, i + 1] | tokens[:, : i + 1]), and whether it is the likeliest: [b, s - 1] each."""
        targets = inputs.tokens[:, 1:]
        if not targets.size(1):
            return targets.float(), targets.bool()
        hidden = self._read(inputs.without_last())
        return scores_of(self._gathered_logits, hidden, targets, self.config.model.padded_vocab_size)

    @torch.no_grad()
    def hidden_states(self, text: str | Sequence[int]) -> torch.Tensor:
        """Return what flows between the layers for one text.

        Returns:
            fp32 [num_layers + 1, s, h]: the first layer's input, the output of each layer; the last one's is normalized
            by the final norm, as transformers gives it.

        Raises:
            ConfigError: if the text is empty or longer than model.max_position_embeddings.
        """
        (ids,) = self.encode(text)
        check_sequences([ids], self.config.model, taken=self._taken(1))
        states: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, __: object, out: tuple[torch.Tensor, ...]) -> None:
            states.append(out[0][0, -len(ids) :].float())

        layers = [layer for layer in self.module.children() if isinstance(layer, InputEmbedding | TransformerLayer)]
        layers = layers[:-1] + [layer for layer in self.module.children() if isinstance(layer, FinalNorm)]
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            self._read(pad_left([ids], self.device))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(states)

    @torch.no_grad()
    def logits(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits.

        Args:
            tokens: int64 [b, s].
            positions: int64 [b, s]; left out, 0 .. s-1.
            document_ids: int64 [b, s]; tokens see those of their own document only. Left out, all are of one.

        Returns:
            fp32 [b, s, vocab_size], on every rank.
        """
        if positions is None:
            positions = torch.arange(tokens.size(1)).expand_as(tokens)
        if document_ids is None:
            document_ids = torch.zeros_like(tokens)
        record = Padded(*(tensor.to(self.device) for tensor in (tokens, positions, document_ids)))
        return self._gathered_logits(self._read(record))
