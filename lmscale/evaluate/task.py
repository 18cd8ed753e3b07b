"""What a model predicts for a task, through its engine: on every layout, while it trains and after.

Logits leave the engine where the loss sees them, on the last stage. Text is written greedily by whole forward passes, one a
token: slow, and the same on pipelines, under ZeRO 3 and on one rank. `lmscale generate` has a cache and is for writing more.
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
from lmscale.data.tokenizer import Tokenizer
from lmscale.feed.prompt import with_prompt
from lmscale.feed.task_rows import RowReader
from lmscale.models.loss import token_log_likelihoods
from lmscale.tasks.base import Rows, Split, Task
from lmscale.tasks.head_rows import end_id
from lmscale.train.engine import Engine, MicroBatch

Observed = Callable[[Any, tuple[torch.Tensor, ...]], torch.Tensor]
"""Outputs and labels of a micro batch to what is kept of it, a row for each of its rows."""


class TaskEvaluation:
    """Measures a task's splits.

    Args:
        engine: of the model.
        task: what is measured.
        config: of the run.
        tokenizer: turns ids into texts.
    """

    def __init__(self, engine: Engine, task: Task, config: RunConfig, tokenizer: Tokenizer):
        self._engine, self._task, self._config, self._tokenizer = engine, task, config, tokenizer

    def measure(self, split: Split) -> dict[str, float]:
        """Predict a split and measure that; with a head, and where labels are compared, the loss too.

        Returns:
            The task's metrics by name, and `loss`: of the right answers, in nats (of values, their squared error).
        Collectives: every rank must call.
        """
        loss, outputs = self._observe(split, _nothing if self._task.head is None else _logits)
        predictions: Any = outputs
        if self._task.compares_labels:
            _, scores = self._observe(split.candidates(), self._log_likelihoods)
            predictions = None if scores is None else scores.reshape(split.num_examples, -1)
        elif self._task.writes_text:
            predictions = self._write(split)
        values = [None if predictions is None else self._task.metrics(split, predictions)]
        dist.broadcast_object_list(values, src=0)
        assert values[0] is not None
        return {"loss": loss, **values[0]}

    def _observe(self, rows: Rows | Split, keep: Observed) -> tuple[float, NDArray[np.float32] | None]:
        """Run rows through the model.

        Returns:
            (mean loss, on every rank; what was kept of each row, in their order, on rank 0 and None elsewhere).
        """
        topology = self._engine.topology
        reader = RowReader(rows, self._config, topology.dp_rank, topology.dp_size)
        kept: list[torch.Tensor] = []

        def observer(outputs: Any, labels: tuple[torch.Tensor, ...]) -> None:
            kept.append(keep(outputs, labels).cpu())

        batches = reader.batches() if self._engine.reads_data else None
        total, count = self._engine.observe(batches, reader.num_micro_batches, observer)
        found = self._gathered(reader.numbers().reshape(-1), kept, rows.num_rows)
        if found is not None and self._task.head in ("token_classes", "span"):
            behind = slice(prompt_length(self._config.adapt), None)
            found = found[:, behind] if self._task.head == "token_classes" else found[..., behind]
        return total / max(count, 1.0), found

    def _gathered(self, numbers: NDArray[np.int64], kept: list[torch.Tensor], num_rows: int) -> Any:
        """Bring what the last stage kept to rank 0, in the order of the rows."""
        topology = self._engine.topology
        mine = None
        if topology.is_last_stage and topology.tp_rank == 0:
            mine = numbers, torch.cat(kept).numpy()
        everyone: list[Any] | None = [None] * topology.world_size if topology.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0)
        if everyone is None:
            return None
        parts = [part for part in everyone if part is not None]
        whole = np.zeros((num_rows, *parts[0][1].shape[1:]), np.float32)
        for places, values in parts:
            whole[places[places >= 0]] = values[places >= 0]
        return whole

    def _log_likelihoods(self, logits: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Sum the log-likelihood of each row's counted labels: fp32 [b]."""
        targets, loss_mask, *_ = labels
        context = self._engine.context
        values = token_log_likelihoods(logits, targets, context.model.vocab_size, context.groups.tp)
        return (values * loss_mask).sum(dim=1)

    # -- writing ---------------------------------------------------------------------------------------------------

    def _write(self, split: Split) -> list[str] | None:
        """Continue the prompts of a split greedily: texts on rank 0, None elsewhere."""
        written = self._write_ids(split)
        topology = self._engine.topology
        everyone: list[Any] | None = [None] * topology.world_size if topology.rank == 0 else None
        is_speaker = topology.is_last_stage and topology.tp_rank == 0
        dist.gather_object(written if is_speaker else None, everyone, dst=0)
        if everyone is None:
            return None
        texts = [""] * split.num_examples
        for part in everyone:
            for number, ids in (part or {}).items():
                texts[number] = self._tokenizer.decode(ids)
        return texts

    def _write_ids(self, split: Split) -> dict[int, list[int]]:
        """Write the new ids of this data-parallel rank's examples: number -> ids, the same on all its ranks."""
        topology, config = self._engine.topology, self._config
        prompts = split.prompts()
        reader = RowReader(split, config, topology.dp_rank, topology.dp_size)
        numbers = reader.numbers()
        stop = end_id(self._tokenizer) if not config.model.has_decoder_stack else self._tokenizer.eos_id
        writing = _Writing(split, prompts, numbers, self._task.max_new_tokens, config)
        for _ in range(self._task.max_new_tokens):
            chosen: list[torch.Tensor] = []

            def observer(logits: Any, labels: tuple[torch.Tensor, ...], into: list[torch.Tensor] = chosen) -> None:
                into.append(self._likeliest(logits, labels[1]))

            batches = writing.batches() if self._engine.reads_data else None
            self._engine.observe(batches, len(numbers), observer)
            tokens = torch.zeros(numbers.shape, dtype=torch.int64, device=topology.device)
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

    def _likeliest(self, logits: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
        """Choose the likeliest token behind the marked place of each row: int64 [b], the same over tensor parallelism."""
        context = self._engine.context
        place = marks.argmax(dim=1)
        last = logits[torch.arange(len(place), device=logits.device), place].float()
        first = last.size(-1) * context.groups.tp.rank()
        valid = max(0, min(last.size(-1), context.model.vocab_size - first))
        last[:, valid:] = -torch.inf
        value, column = last.max(dim=-1)
        best = torch.stack((value.double(), (column + first).double()))
        group = context.groups.tp
        if group.size() > 1:
            shards = [torch.empty_like(best) for _ in range(group.size())]
            dist.all_gather(shards, best, group=group)
            values = torch.stack([shard[0] for shard in shards])
            return torch.stack([shard[1] for shard in shards])[values.argmax(dim=0), torch.arange(len(place))].long()
        return best[1].long()


def _logits(logits: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Keep what a head gave."""
    return logits.float()


def _nothing(logits: Any, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Keep a number for each row: logits over a vocabulary are too many."""
    return labels[1].new_zeros(len(labels[1]))


class _Writing:
    """Rows whose texts grow by a token at a time."""

    def __init__(
        self, split: Split, prompts: list[list[int]], numbers: NDArray[np.int64], most: int, config: RunConfig
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
            if self._tells_rows_apart:
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
