"""What a model predicts for a task, through its engine: on every layout, while it trains and after.

Logits leave the engine where the loss sees them, on the last stage. Text is written greedily (lmscale.evaluate.writing).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from lmscale.config.adapt import prompt_length
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.evaluate.writing import Writing, write_ids
from lmscale.feed.task_rows import RowReader
from lmscale.models.loss import token_log_likelihoods
from lmscale.tasks.base import Rows, Split, Task
from lmscale.tasks.head_rows import end_id
from lmscale.train.engine import Engine

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
        writing = Writing(prompts, numbers, self._task.max_new_tokens, config, split)
        return write_ids(self._engine, writing, self._task.max_new_tokens, stop)


def _logits(logits: torch.Tensor, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Keep what a head gave."""
    return logits.float()


def _nothing(logits: Any, labels: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Keep a number for each row: logits over a vocabulary are too many."""
    return labels[1].new_zeros(len(labels[1]))
