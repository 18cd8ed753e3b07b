"""Text written by the engine that trains: by whole forward passes, a token each.

Slow, and the same on pipelines, under tensor parallelism, under ZeRO 3 and on one rank. `lmscale generate` has a cache and is
for writing more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lmscale import batch as fields
from lmscale.config.adapt import num_adaptations, prompt_length
from lmscale.config.run import RunConfig
from lmscale.feed.prompt import with_prompt
from lmscale.models.context import ModelContext
from lmscale.tasks.base import Split
from lmscale.train.engine import Engine, MicroBatch

Perturb = Callable[[torch.Tensor], torch.Tensor]
"""Logits float32 [b, v/t] -> what the largest is taken of."""


class Writing:
    """Rows whose texts grow by a token at a time.

    Args:
        prompts: token ids that are continued.
        numbers: the prompt of each row, -1 of fillers: int64 [micro batches, micro batch size].
        most: new tokens of each, at most.
        config: of the run.
        split: where rows are an encoder's, what the encoder reads; and whose adaptation each row is.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        numbers: NDArray[np.int64],
        most: int,
        config: RunConfig,
        split: Split | None = None,
    ):
        self._split, self._numbers, self._config = split, numbers, config
        self._has_decoder = config.model.has_decoder_stack
        self._tells_rows_apart = num_adaptations(config.adapt) > 1
        self._prompts, self._prompt_length = prompts, prompt_length(config.adapt)
        self._ids: dict[int, list[int]] = {int(number): [] for number in numbers.ravel() if number >= 0}
        self._done: set[int] = set()
        longest = 1 if self._has_decoder else max(map(len, prompts))
        self._length = self._rounded(longest + most - 1)

    def _rounded(self, length: int) -> int:
        """Return a length that sequence parallelism divides, within the rows' own."""
        tp_size, lengths = self._config.parallel.tp_size, self._config.lengths
        front = 0 if self._has_decoder else self._prompt_length
        whole = -(-(front + length) // tp_size) * tp_size
        return min(whole, lengths.decoder if self._has_decoder else lengths.encoder) - front

    @property
    def num_micro_batches(self) -> int:
        """Micro batches of each pass."""
        return len(self._numbers)

    @property
    def shape(self) -> tuple[int, int]:
        """Micro batches, and rows of each."""
        return self._numbers.shape  # type: ignore[return-value]

    @property
    def num_unfinished(self) -> int:
        """Rows of this rank that have not come to their end."""
        return len(self._ids) - len(self._done)

    def append(self, tokens: NDArray[np.int64], stop: int | None) -> None:
        """Take the next token of every row, in the order of `numbers`."""
        for number, token in zip(self._numbers.ravel().tolist(), tokens.ravel().tolist(), strict=True):
            if number < 0 or number in self._done:
                continue
            if token == stop:
                self._done.add(number)
            else:
                self._ids[number].append(token)

    def results(self) -> dict[int, list[int]]:
        """Return what was written."""
        return self._ids

    def batches(self) -> Iterator[MicroBatch]:
        """Make the micro batches of the next pass; loss_mask marks the place whose next token is asked for."""
        for numbers in self._numbers:
            made = self._decoder_rows(numbers) if self._has_decoder else self._rows(numbers)
            if self._tells_rows_apart and self._split is not None:
                made[fields.ADAPTER_IDS.name] = self._split.arrays(numbers)[fields.ADAPTER_IDS.name]
            if self._prompt_length:
                made = with_prompt(made, self._prompt_length)
            yield {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in made.items()}

    def _rows(self, numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        texts = [self._prompts[max(number, 0)] + self._ids.get(number, []) for number in numbers.tolist()]
        tokens, marks = self._placed(texts)
        read = np.array([len(self._prompts[max(number, 0)]) for number in numbers.tolist()])
        return {
            fields.TOKENS.name: tokens,
            fields.IS_PREFIX.name: (np.arange(self._length) < read[:, None]).astype(np.int64),
            fields.POSITIONS.name: np.broadcast_to(np.arange(self._length), tokens.shape),
            fields.DOCUMENT_IDS.name: np.zeros_like(tokens),
            fields.LABELS.name: np.zeros_like(tokens),
            fields.LOSS_MASK.name: marks,
        }

    def _decoder_rows(self, numbers: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        assert self._split is not None
        arrays = self._split.arrays(numbers)
        starts = arrays[fields.DECODER_TOKENS.name][:, 0].tolist()
        texts = [[start, *self._ids.get(number, [])] for start, number in zip(starts, numbers.tolist(), strict=True)]
        tokens, marks = self._placed(texts)
        return {
            **arrays,
            fields.POSITIONS.name: np.broadcast_to(
                np.arange(arrays[fields.TOKENS.name].shape[1]), arrays[fields.TOKENS.name].shape
            ),
            fields.DECODER_TOKENS.name: tokens,
            fields.DECODER_POSITIONS.name: np.broadcast_to(np.arange(self._length), tokens.shape),
            fields.DECODER_DOCUMENT_IDS.name: np.zeros_like(tokens),
            fields.LABELS.name: np.zeros_like(tokens),
            fields.LOSS_MASK.name: marks,
        }

    def _placed(self, texts: list[list[int]]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        tokens = np.zeros((len(texts), self._length), np.int64)
        marks = np.zeros((len(texts), self._length), np.float32)
        for row, ids in enumerate(texts):
            kept = ids[: self._length]
            tokens[row, : len(kept)] = kept
            marks[row, len(kept) - 1] = 1.0
        return tokens, marks


def write_ids(
    engine: Engine, writing: Writing, most: int, stop: int | None, perturb: Perturb = lambda logits: logits
) -> dict[int, list[int]]:
    """Write the new ids of this data-parallel rank's rows: number -> ids, the same on all its ranks.

    Args:
        engine: of the model.
        writing: the rows.
        most: passes, at most.
        stop: the id that ends a text.
        perturb: changes the logits before the likeliest token is taken.
    Collectives: every rank must call.
    """
    topology = engine.topology
    for _ in range(most):
        chosen: list[torch.Tensor] = []

        def observer(logits: Any, labels: tuple[torch.Tensor, ...], into: list[torch.Tensor] = chosen) -> None:
            into.append(likeliest(engine.context, logits, labels[1], perturb))

        batches = writing.batches() if engine.reads_data else None
        engine.observe(batches, writing.num_micro_batches, observer)
        tokens = torch.zeros(writing.shape, dtype=torch.int64, device=topology.device)
        if topology.is_last_stage:
            tokens.copy_(torch.stack(chosen))
        if topology.pp_size > 1:
            dist.broadcast(tokens, group=topology.pp_group, group_src=topology.pp_size - 1)
        writing.append(tokens.cpu().numpy(), stop)
        left = torch.tensor(float(writing.num_unfinished), device=topology.device)
        dist.all_reduce(left)
        if not float(left):
            break
    return writing.results()


def likeliest(
    context: ModelContext, logits: torch.Tensor, marks: torch.Tensor, perturb: Perturb = lambda logits: logits
) -> torch.Tensor:
    """Choose the likeliest token behind the marked place of each row: int64 [b], the same over tensor parallelism."""
    group = context.groups.tp
    place = marks.argmax(dim=1)
    last = perturb(logits[torch.arange(len(place), device=logits.device), place].float())
    first = last.size(-1) * group.rank()
    valid = max(0, min(last.size(-1), context.model.vocab_size - first))
    last[:, valid:] = -torch.inf
    value, column = last.max(dim=-1)
    best = torch.stack((value.double(), (column + first).double()))
    if group.size() > 1:
        shards = [torch.empty_like(best) for _ in range(group.size())]
        dist.all_gather(shards, best, group=group)
        values = torch.stack([shard[0] for shard in shards])
        return torch.stack([shard[1] for shard in shards])[values.argmax(dim=0), torch.arange(len(place))].long()
    return best[1].long()
