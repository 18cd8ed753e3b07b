"""A trained model in Python: write text, score it, look at hidden states.

Shapes: b sequences, s tokens, h hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TypeGuard

import torch
import torch.distributed as dist

from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import Tokenizer, load_tokenizer
from lmscale.errors import ConfigError
from lmscale.evaluate.batches import Padded, check_sequences, pad_left
from lmscale.evaluate.loading import build_module, read_config, start_topology
from lmscale.evaluate.sampling import Sampler, Sampling
from lmscale.models.attention import CoreAttention, KeyValueCache
from lmscale.models.block import TransformerLayer
from lmscale.models.build import SequentialModel
from lmscale.models.context import ModelContext
from lmscale.models.embedding import FinalNorm, InputEmbedding
from lmscale.train.checkpoint_reader import CheckpointReader, resolve_checkpoint

DEFAULT_NEW_TOKENS = 128
_LOGITS_BYTES = 64 * 2**20
"""fp32 logits that are held at a time while a text is scored."""

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        token_ids: the n tokens.
        log_likelihoods: n - 1 values in nats: log p(token i + 1 | tokens 0 .. i). The first token follows nothing and
            has none.
    """

    token_ids: list[int]
    log_likelihoods: list[float]

    @property
    def total(self) -> float:
        """The sum of log_likelihoods."""
        return sum(self.log_likelihoods)


def load(
    checkpoint: str | Path, device: str | torch.device | None = None, precision: str | None = None
) -> LanguageModel:
    """Load a checkpoint of any layout, to generate and to score.

    One process holds the whole model; ranks started by torchrun or deepspeed share it by tensor parallelism, and all of
    them make the same calls.

    Args:
        checkpoint: a checkpoint's directory, or a run's or its checkpoints/, of which the newest is taken.
        device: where to compute, as in "cpu"; left out, the rank's GPU where there is one.
        precision: fp32, bf16 or fp16; left out, the run's.

    Raises:
        CheckpointError: if there is no whole checkpoint.
        ConfigError: if the model does not divide over the ranks, or the device is not there.
    Collectives: every rank must call.
    """
    path = resolve_checkpoint(Path(checkpoint))
    reader, config = CheckpointReader(path), read_config(path)
    topology = start_topology(config, device)
    module, context = build_module(reader, config, topology, precision or config.precision)
    return LanguageModel(module, context, config)


class LanguageModel:
    """A model in eval mode. Made by `load`.

    Under tensor parallelism each method is a collective over the model's ranks: all of them call it with the same
    arguments, and all get the same result.

    Attributes:
        module: the layers; (tokens, positions, document_ids), int64 [b, s] each, to logits [b, s, v/t].
        context: what the layers share; `context.topology.device` is where they are.
        config: of the run that trained the model.
    """

    def __init__(self, module: SequentialModel, context: ModelContext, config: RunConfig):
        self.module, self.context, self.config = module, context, config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.context.topology.device

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint carries.

        Raises:
            ConfigError: if the run had none.
        """
        if self.config.tokenizer is None:
            raise ConfigError(
                "is missing from the checkpoint's config",
                field="tokenizer",
                remedy="give token ids, to generate_ids or score",
            )
        return load_tokenizer(self.config.tokenizer)

    # -- writing ---------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_at_eos: bool = True,
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

        Returns:
            Each prompt with its continuation.

        Raises:
            ConfigError: before anything is computed: if a prompt is empty or, with the new tokens, longer than
                model.max_position_embeddings, or an option is out of range.
        """
        ids = self._encode(prompts)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stop_id = self.tokenizer.eos_id if stop_at_eos else None
        new = self.generate_ids(ids, max_new_tokens, sampling, stop_id)
        return [self.tokenizer.decode([*before, *after]) for before, after in zip(ids, new, strict=True)]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        stop_id: int | None = None,
    ) -> list[list[int]]:
        """Continue token ids: the same without a tokenizer.

        Args:
            prompts: token ids.
            max_new_tokens: as in `generate`.
            sampling: how tokens are chosen; left out, by the model's own probabilities.
            stop_id: the token that ends a sequence; None lets all go on to the end.

        Returns:
            The new ids of each prompt, without stop_id.
        """
        if not prompts:
            return []
        num_new = self._room(prompts, max_new_tokens)
        sampler = Sampler(sampling or Sampling(), self.device)
        inputs = pad_left(prompts, self.device)
        is_done = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        written: list[torch.Tensor] = []
        with _cached(self.module, capacity=inputs.tokens.size(1) + num_new - 1):
            while len(written) < num_new:
                written.append(self._next(inputs, sampler))
                inputs = inputs.after(written[-1])
                if stop_id is not None:
                    is_done |= written[-1] == stop_id
                    if is_done.all():
                        break
        return [_until(row, stop_id) for row in torch.stack(written, dim=1).tolist()]

    def _next(self, inputs: Padded, sampler: Sampler) -> torch.Tensor:
        """Read tokens behind those in the cache, and choose the next: int64 [b], the same on every rank."""
        hidden = self.module.trunk(inputs.packed)[0]
        tokens = sampler(self._gathered_logits(hidden[:, -1:]).squeeze(1))
        group = self.context.groups.tp
        if group.size() > 1:
            # A GPU's cumulative sums need not agree to the last bit, and one other token would part the ranks for good.
            dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    def _room(self, prompts: Sequence[Sequence[int]], max_new_tokens: int | None) -> int:
        """Check the prompts and return how many tokens are to be written behind each."""
        longest = max(map(len, prompts))
        if max_new_tokens is None:
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, self.config.model.max_position_embeddings - longest))
        if max_new_tokens < 1:
            raise ConfigError("must be at least 1", field="max_new_tokens", value=max_new_tokens)
        check_sequences(prompts, self.config.model, max_new_tokens)
        return max_new_tokens

    # -- reading ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def score(self, texts: Prompts, batch_size: int = 8) -> list[Score]:
        """Compute the log-likelihood of each token of texts, given those before it in its text.

        Args:
            texts: as in `generate`.
            batch_size: texts that are read at a time.

        Raises:
            ConfigError: if a text is empty or longer than model.max_position_embeddings.
        """
        sequences = self._encode(texts)
        check_sequences(sequences, self.config.model)
        scores = []
        for first in range(0, len(sequences), batch_size):
            batch = sequences[first : first + batch_size]
            values = self._log_likelihoods(pad_left(batch, self.device)).tolist()
            for ids, row in zip(batch, values, strict=True):
                scores.append(Score(list(ids), row[len(row) - (len(ids) - 1) :]))
        return scores

    def _log_likelihoods(self, inputs: Padded) -> torch.Tensor:
        """Compute log p(tokens[:, i + 1] | tokens[:, : i + 1]), fp32 [b, s - 1]."""
        hidden, targets = self.module.trunk(inputs.packed)[0][:, :-1], inputs.tokens[:, 1:, None]
        bytes_each = 4 * hidden.size(0) * self.config.model.padded_vocab_size
        step = max(1, _LOGITS_BYTES // bytes_each)
        parts = [
            self._gathered_logits(block).log_softmax(dim=-1).gather(2, target).squeeze(2)
            for block, target in zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True)
        ]
        return torch.cat(parts, dim=1)

    @torch.no_grad()
    def hidden_states(self, text: str | Sequence[int]) -> torch.Tensor:
        """Return what flows between the layers for one text.

        Returns:
            fp32 [num_layers + 1, s, h]: the first layer's input, the output of each layer; the last one's is normalized
            by the final norm, as transformers gives it.

        Raises:
            ConfigError: if the text is empty or longer than model.max_position_embeddings.
        """
        (ids,) = self._encode(text)
        check_sequences([ids], self.config.model)
        states: list[torch.Tensor] = []

        def keep(_: torch.nn.Module, __: object, out: tuple[torch.Tensor, ...]) -> None:
            states.append(out[0][0].float())

        layers = [layer for layer in self.module.children() if isinstance(layer, InputEmbedding | TransformerLayer)]
        layers = layers[:-1] + [layer for layer in self.module.children() if isinstance(layer, FinalNorm)]
        hooks = [layer.register_forward_hook(keep) for layer in layers]
        try:
            self.module.trunk(pad_left([ids], self.device).packed)
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
        packed = tuple(tensor.to(self.device) for tensor in (tokens, positions, document_ids))
        return self._gathered_logits(self.module.trunk(packed)[0])

    def _gathered_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make logits of final hidden states [b, s, h]: fp32 [b, s, vocab_size], padded ids left out.

        Collectives: an all-gather over the tensor-parallel group.
        """
        group = self.context.groups.tp
        mine = self.module.head(hidden)
        if group.size() > 1:
            shards = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(shards, mine.contiguous(), group=group)
            mine = torch.cat(shards, dim=-1)
        return mine[..., : self.config.model.vocab_size].float()

    def _encode(self, prompts: Prompts) -> list[list[int]]:
        if isinstance(prompts, str):
            return [self.tokenizer.encode(prompts)]
        if _are_texts(prompts):
            return self.tokenizer.encode_batch(prompts)
        if all(isinstance(item, Integral) for item in prompts):
            return [[int(item) for item in prompts]] if prompts else []  # type: ignore[arg-type]
        return [[int(number) for number in item] for item in prompts]  # type: ignore[union-attr]


def _are_texts(prompts: Sequence[object]) -> TypeGuard[Sequence[str]]:
    return bool(prompts) and all(isinstance(item, str) for item in prompts)


def _until(ids: list[int], stop_id: int | None) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


@contextlib.contextmanager
def _cached(module: SequentialModel, capacity: int) -> Iterator[None]:
    """Give each layer's attention a key/value cache of `capacity` tokens, inside the context."""
    attentions = [layer for layer in module.modules() if isinstance(layer, CoreAttention)]
    for attention in attentions:
        attention.cache = KeyValueCache(capacity)
    try:
        yield
    finally:
        for attention in attentions:
            attention.cache = None
