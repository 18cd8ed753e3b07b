"""What trained models of all architectures share: where they are, their tokenizer, their logits, their draws."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any, NoReturn, TypeGuard

import torch
import torch.distributed as dist

from lmscale.adapt.table import AdapterTable
from lmscale.batch import PROMPT_PLACES, TOKENS
from lmscale.config.adapt import prefix_length, prompt_length
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import Tokenizer, load_tokenizer
from lmscale.errors import ConfigError
from lmscale.evaluate.fronts import Fields, put_in_front
from lmscale.evaluate.sampling import Sampler
from lmscale.models.attention import CoreAttention
from lmscale.models.build import SequentialModel
from lmscale.models.context import ModelContext
from lmscale.models.cross_attention import CrossAttention
from lmscale.models.relative_bias import RelativeBias

DEFAULT_NEW_TOKENS = 128
LOGITS_BYTES = 64 * 2**20
"""fp32 logits that are held at a time while a text is scored."""

Adapters = str | Sequence[str | None] | None
"""The adaptation of each row, or of all."""
Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
IsEnd = Callable[[list[int]], bool]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a text.

    Attributes:
        token_ids: the n tokens.
        log_likelihoods: in nats: log p(token | all before it), of every token but what follows nothing. That is the
            first one of a decoder-only model, which has n - 1 values; an encoder-decoder has n, given the source too.
        are_likeliest: for each of them, whether no other token was likelier.
    """

    token_ids: list[int]
    log_likelihoods: list[float]
    are_likeliest: list[bool]

    @property
    def total(self) -> float:
        """The sum of log_likelihoods."""
        return sum(self.log_likelihoods)


class TrainedModel:
    """A model, or an adaptation of one, in eval mode.

    Made by `lmscale.evaluate.inference.load`, which chooses the class by the architecture.

    Under tensor parallelism each method is a collective over the model's ranks: all of them call it with the same
    arguments, and all get the same result. What an architecture cannot do raises a ConfigError.

    Attributes:
        module: the layers; the fields that `context.wire` names, int64, to logits [b, s, v/t].
        context: what the layers share; `context.topology.device` is where they are.
        config: of the run that trained the model.
        table: of adaptations that rows choose from, where `load` was given some.
    """

    def __init__(self, module: SequentialModel, context: ModelContext, config: RunConfig):
        self.module, self.context, self.config = module, context, config
        self.table: AdapterTable | None = None

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

    # -- what not every architecture can do --------------------------------------------------------------------------

    def generate(self, prompts: Prompts, *args: Any, **options: Any) -> list[str]:
        """Write text: see the class of each architecture."""
        self._refuse("write text")

    def generate_ids(self, prompts: Sequence[Sequence[int]], *args: Any, **options: Any) -> list[list[int]]:
        """Write token ids: gpt, bart and t5."""
        self._refuse("write new tokens")

    def score(self, *args: Any, **options: Any) -> list[Score]:
        """Compute log-likelihoods of texts: gpt, bart and t5."""
        self._refuse("give a text a likelihood")

    def fill(self, text: str | Sequence[int], *args: Any, **options: Any) -> Any:
        """Propose tokens for masks: bert and roberta."""
        self._refuse("propose tokens for masks")

    def hidden_states(self, text: str | Sequence[int]) -> torch.Tensor:
        """Return what flows between the layers: gpt."""
        self._refuse("show its hidden states")

    def _refuse(self, deed: str) -> NoReturn:
        remedies = {
            "gpt": "use generate, generate_ids, score, logits or hidden_states",
            "bert": "use fill, generate (fills the masks) or logits",
            "bart": "use generate, generate_ids, score(sources, targets) or logits",
        }
        kind = self.config.model.architecture
        remedies |= {"roberta": remedies["bert"], "t5": remedies["bart"]}
        raise ConfigError(f"cannot {deed}", field="model.architecture", value=kind, remedy=remedies[kind])

    def inputs_of(self, found: Fields) -> tuple[torch.Tensor, ...]:
        """Put the fields of a batch on the wire, behind room for the adaptation's prompt where it has one.

        Logits of a decoder-only model then have as many places more in front.
        """
        return self._packed(**(found if PROMPT_PLACES.name in found else self._with_prompts(found)))

    # -- adaptations -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def using(self, adapters: Adapters, num_rows: int | None = None) -> Iterator[None]:
        """Have each row of a batch computed with the adaptation that it names, inside the context.

        Args:
            adapters: a name for each row, None for the base; or one name for all. Left None, nothing changes.
            num_rows: of the batch; to be given with one name for all.

        Raises:
            ConfigError: if a name is unknown, or there are not as many names as rows.
        """
        if adapters is None:
            yield
            return
        names = [adapters] * (num_rows or 1) if isinstance(adapters, str) else list(adapters)
        if num_rows is not None and len(names) != num_rows:
            rule = f"there are {num_rows} prompts"
            raise ConfigError(rule, field="adapters", value=len(names), remedy="name one for each, None for the base")
        if self.table is None:
            remedy = "lmscale.load(BASE, adapters={name: path})"
            raise ConfigError(
                "the model was loaded without adaptations", field="adapters", value=names[0], remedy=remedy
            )
        with self.table.using(names):
            yield

    def _prompt_lengths(self, num_rows: int) -> list[int]:
        """Return the trained vectors that stand before the tokens of each row of a batch."""
        if self.table is not None and self.table.is_in_use:
            return self.table.prompt_lengths
        return [prompt_length(self.config.adapt)] * num_rows

    def _prefix_lengths(self, num_rows: int) -> list[int]:
        """Return the trained keys before the first token of each row, from which positions count."""
        if self.table is not None and self.table.is_in_use:
            return self.table.prefix_lengths
        return [prefix_length(self.config.adapt)] * num_rows

    def _taken(self, num_rows: int) -> list[int]:
        """Return the positions that an adaptation takes from each row's tokens."""
        pairs = zip(self._prefix_lengths(num_rows), self._prompt_lengths(num_rows), strict=True)
        return [prefix + prompt for prefix, prompt in pairs]

    def _with_prompts(self, found: Fields) -> Fields:
        """Make room for trained prompts in the fields of a batch, where the model reads them."""
        if PROMPT_PLACES.name not in self.context.wire.carried:
            return found
        is_encoder_only = self.config.model.is_encoder_only
        return put_in_front(found, self._prompt_lengths(len(found[TOKENS.name])), is_encoder_only)

    # -- for the classes of the architectures ------------------------------------------------------------------------

    def _packed(self, **fields: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Put fields (lmscale.batch) on the wire, in its order, on the model's device."""
        names = (TOKENS.name, *self.context.wire.carried)
        return tuple(fields[name].to(self.device) for name in names)

    def special_id(self, name: str) -> int:
        """Return the id of a special token (pad, bos, eos, mask, cls or sep).

        Raises:
            ConfigError: if the tokenizer has none.
        """
        number: int | None = getattr(self.tokenizer, f"{name}_id")
        if number is None:
            rule = f"has no {name} token, which {self.config.model.architecture} needs"
            raise ConfigError(rule, field="tokenizer", remedy="use the tokenizer of the model's run")
        return number

    def _gathered_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Make logits of final hidden states [b, s, h]: fp32 [b, s, vocab_size], padded ids left out.

        Collectives: an all-gather over the tensor-parallel group.
        """
        return self._gathered(self.module.head(hidden))

    def _gathered(self, mine: torch.Tensor) -> torch.Tensor:
        """Gather logits [b, s, v/t] of all tensor-parallel ranks: fp32 [b, s, vocab_size]."""
        group = self.context.groups.tp
        if group.size() > 1:
            shards = [torch.empty_like(mine) for _ in range(group.size())]
            dist.all_gather(shards, mine.contiguous(), group=group)
            mine = torch.cat(shards, dim=-1)
        return mine[..., : self.config.model.vocab_size].float()

    def _agreed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the tokens that the first rank chose.

        A GPU's cumulative sums need not agree to the last bit, and one other token would part the ranks for good.
        """
        group = self.context.groups.tp
        if group.size() > 1:
            dist.broadcast(tokens, group=group, group_src=0)
        return tokens

    def _write(
        self,
        read: Callable[[torch.Tensor | None], torch.Tensor],
        num_new: int,
        sampler: Sampler,
        stop_id: int | None,
        is_end: IsEnd | None,
    ) -> list[list[int]]:
        """Choose tokens one after another, for a batch.

        Args:
            read: takes the tokens chosen last, int64 [b], None at first, and returns the logits of the next ones, fp32
                [b, vocab_size].
            num_new: tokens to choose for each sequence.
            sampler: chooses.
            stop_id: the token that ends a sequence.
            is_end: tells of a sequence's new ids whether it ends with them.

        Returns:
            New ids, without stop_id and what follows it; what follows the end that is_end told of may be there.
        """
        written: list[torch.Tensor] = []
        tokens: torch.Tensor | None = None
        is_done: torch.Tensor | None = None
        while len(written) < num_new:
            tokens = self._agreed(sampler(read(tokens)))
            written.append(tokens)
            is_done = torch.zeros_like(tokens, dtype=torch.bool) if is_done is None else is_done
            if stop_id is not None:
                is_done |= tokens == stop_id
            if is_end is not None:
                rows = torch.stack(written, dim=1).tolist()
                is_done |= torch.tensor([is_end(_until(row, stop_id)) for row in rows], device=tokens.device)
            if is_done.all():
                break
        return [_until(row, stop_id) for row in torch.stack(written, dim=1).tolist()]

    def encode(self, prompts: Prompts) -> list[list[int]]:
        """Encode a text or texts, without the special tokens at their ends; token ids stay as they are."""
        if isinstance(prompts, str):
            return self._encode_texts([prompts])
        if _are_texts(prompts):
            return self._encode_texts(prompts)
        if all(isinstance(item, Integral) for item in prompts):
            return [[int(item) for item in prompts]] if prompts else []  # type: ignore[arg-type]
        return [[int(number) for number in item] for item in prompts]  # type: ignore[union-attr]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens and without rows of the table that stand for no token."""
        return self.tokenizer.decode([token for token in ids if token < self.tokenizer.vocab_size])

    def _encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer.encode_batch(texts)


def scores_of(
    logits: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log p of targets, and whether each is the likeliest, a block of logits at a time.

    Shapes: hidden [b, s, h]; targets int64 [b, s]; logits(hidden) fp32 [b, s, vocab_size]; results fp32 and bool [b, s].
    """
    step = max(1, LOGITS_BYTES // (4 * max(1, hidden.size(0)) * vocab_size))
    values, are_likeliest = [], []
    for block, target in zip(hidden.split(step, dim=1), targets.split(step, dim=1), strict=True):
        log_p = logits(block).log_softmax(dim=-1)
        values.append(log_p.gather(2, target[..., None]).squeeze(2))
        are_likeliest.append(log_p.argmax(dim=-1) == target)
    return torch.cat(values, dim=1), torch.cat(are_likeliest, dim=1)


@contextlib.contextmanager
def cached(module: SequentialModel, capacity: int) -> Iterator[None]:
    """Let the layers that can keep what they computed of the tokens before, at most `capacity`, inside the context."""
    layers = [layer for layer in module.modules() if isinstance(layer, CoreAttention | CrossAttention | RelativeBias)]
    for layer in layers:
        layer.cache = layer.new_cache(capacity)
    try:
        yield
    finally:
        for layer in layers:
            layer.cache = None


def _are_texts(prompts: Sequence[object]) -> TypeGuard[Sequence[str]]:
    return bool(prompts) and all(isinstance(item, str) for item in prompts)


def _until(ids: list[int], stop_id: int | None) -> list[int]:
    return ids[: ids.index(stop_id)] if stop_id in ids else ids
