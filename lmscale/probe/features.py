"""Features: what a model computes of a task's rows, in one pass forward, on every layout.

The engine is the one that fine-tuning has, with a task's head that is never trained: DeepSpeed asks for an optimizer with a
parameter on every pipeline stage, and so it is given that head, and an idle parameter on the stages before. Hooks on the
layers take what comes out of them: each stage takes of its own layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import nn

from lmscale.batch import PADDING_ID
from lmscale.config.run import RunConfig
from lmscale.feed.task_rows import RowReader
from lmscale.models.block import TransformerLayer
from lmscale.models.embedding import FinalNorm, InputEmbedding
from lmscale.plan.probing import Pooling
from lmscale.probe.units import Units
from lmscale.tasks.base import Split
from lmscale.tasks.texts import Ints
from lmscale.train.engine import Engine


class FeaturePass:
    """One pass over a split.

    Args:
        engine: of the model.
        config: of the run.
        split: the rows.
        units: of the split.
        pooling: what is kept of a row.
    """

    def __init__(self, engine: Engine, config: RunConfig, split: Split, units: Units, pooling: Pooling):
        self._engine, self._config, self._split = engine, config, split
        self._units, self._pooling = units, pooling

    def features(self, layers: list[int]) -> Iterator[tuple[int, torch.Tensor | None]]:
        """Compute the features after some layers, without dropout and gradients.

        Layer 0 is the embeddings' output, layer i the output of the i-th transformer layer; the last is taken behind the
        final norm where the model has one. Until they are yielded, every rank holds what its stage made of its rows, in
        memory of the host: 4 h bytes for each unit and layer, 4 s h with pooling sequence.

        Yields:
            (layer, fp32 [u, h], or [u, s, h] with pooling sequence, on rank 0 and None elsewhere), each layer in its turn.
        Collectives: every rank must call, and take all.
        """
        engine = self._engine
        topology, reader = engine.topology, self._reader(engine.topology.dp_rank)
        with _Taker(engine, layers, self._pooling, self._units, reader.numbers()) as kept:
            engine.evaluate(reader.batches() if engine.reads_data else None, reader.num_micro_batches)
        holders: list[Any] = [None] * topology.world_size
        dist.all_gather_object(holders, (topology.dp_rank, sorted(kept)))
        for layer in layers:
            mine = torch.cat(kept.pop(layer)) if layer in kept else None
            yield layer, self._gathered(mine, [(rank, dp) for rank, (dp, held) in enumerate(holders) if layer in held])

    def _reader(self, dp_rank: int) -> RowReader:
        return RowReader(self._split, self._config, dp_rank, self._engine.topology.dp_size)

    def _gathered(self, mine: torch.Tensor | None, holders: list[tuple[int, int]]) -> torch.Tensor | None:
        """Bring a layer's parts to rank 0, one after the other, and put them into the order of the units."""
        topology, units = self._engine.topology, self._units
        width, hidden = units.is_token.shape[1], self._config.model.hidden_size
        shape = (width, hidden) if self._pooling == "sequence" else (hidden,)
        whole = torch.zeros((units.num_units, *shape)) if topology.rank == 0 else None
        for rank, dp_rank in holders:
            if rank == topology.rank != 0:
                assert mine is not None
                dist.send(mine.to(topology.device), dst=0)
            elif whole is not None:
                places = torch.from_numpy(units.of_rows(self._reader(dp_rank).numbers().reshape(-1)))
                part = mine
                if rank != 0:
                    part = torch.empty((len(places), *shape), device=topology.device)
                    dist.recv(part, src=rank)
                assert part is not None
                whole[places] = part.cpu()
        return whole


class _Taker:
    """Takes what comes out of this rank's layers while it is open, on the first tensor-parallel rank."""

    def __init__(self, engine: Engine, layers: list[int], pooling: Pooling, units: Units, numbers: Ints):
        self._context, self._pooling, self._units, self._numbers = engine.context, pooling, units, numbers
        self._kept: dict[int, list[torch.Tensor]] = {}
        self._seen: dict[int, int] = {}
        self._modules = {layer: module for layer, module in _outlets(engine).items() if layer in layers}

    def __enter__(self) -> dict[int, list[torch.Tensor]]:
        self._hooks = [module.register_forward_hook(self._hook(layer)) for layer, module in self._modules.items()]
        return self._kept

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, layer: int) -> Any:
        def take(_module: nn.Module, _inputs: Any, out: Any) -> None:
            context = self._context
            record = context.wire.unpack(out)
            hidden = record.hidden
            if context.sequence_parallel:
                hidden = gather_from_sequence_parallel_region(
                    hidden, tensor_parallel_output_grad=False, group=context.groups.tp
                ).transpose(0, 1)
            numbers = self._numbers[self._seen.setdefault(layer, 0)]
            self._seen[layer] += 1
            if context.topology.tp_rank == 0:
                assert record.document_ids is not None
                pooled = self._pool(hidden.float(), record.document_ids != PADDING_ID, numbers)
                self._kept.setdefault(layer, []).append(pooled.cpu())

        return take

    def _pool(self, hidden: torch.Tensor, is_token: torch.Tensor, numbers: Ints) -> torch.Tensor:
        """Keep what is asked for of [b, s, h]: [units, h] or [units, s, h]; rows that fill the batch have no units."""
        units = self._units.of_rows(numbers)
        if self._pooling == "words":
            assert self._units.places is not None
            places, starts = self._units.places[units], self._units.starts
            rows = torch.arange(len(numbers)).repeat_interleave(
                torch.tensor([int(starts[n + 1] - starts[n]) if n >= 0 else 0 for n in numbers.tolist()])
            )
            return hidden[rows.to(hidden.device), torch.from_numpy(places).to(hidden.device)]
        is_row = torch.from_numpy(numbers >= 0).to(hidden.device)
        hidden, is_token = hidden[is_row], is_token[is_row]
        if self._pooling == "sequence":
            return hidden
        if self._pooling == "mean":
            weights = is_token.float()[..., None]
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)
        if self._pooling == "last":
            last = (torch.arange(hidden.size(1), device=hidden.device) * is_token).argmax(dim=1)
            return hidden[torch.arange(len(hidden), device=hidden.device), last]
        return hidden[:, 0]


def _outlets(engine: Engine) -> dict[int, nn.Module]:
    """Find the modules of this rank whose outputs are the hidden states after each layer."""
    found: dict[int, nn.Module] = {}
    last = engine.context.model.num_layers
    has_final_norm = engine.context.model.norm_position == "pre"
    for module in engine.model.modules():
        if isinstance(module, InputEmbedding):
            found[0] = module
        elif isinstance(module, FinalNorm):
            found[last] = module
        elif isinstance(module, TransformerLayer):
            layer = int(module.key.rpartition(".")[2]) + 1
            if layer < last or not has_final_norm:
                found[layer] = module
    return found
