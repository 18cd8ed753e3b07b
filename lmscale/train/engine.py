"""A training engine over DeepSpeed's two, with one face.

The one file that knows DeepSpeed's quirks. Each is named where it is mended, and tests/train/test_engine_quirks.py pins
what we rely on:

- ZeRO 0 reports no gradient norm, and with pipelines clips by a wrong one: we clip and measure (GradientClipper).
- The engine's boundary of accumulation counts all micro steps so far: wrong once a batch ramp changes their number.
- fp16: the optimizer unscales with the scale of after its update, so a step in which the scale doubles is halved:
  growth waits until the step is done (_DeferredGrowth).
- ZeRO 0 copies all gradients to a flat buffer and back to reduce them, on a lone data-parallel rank too: not there.
- A wire that changes its length needs its buffers reset.
- A pipeline learns its loss after the update; we ask for it before, once.
- Whether an update happens is for each optimizer to say: lmscale.train.update_gate puts a gate into each.
"""

from __future__ import annotations

import functools
import math
import resource
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from lmscale.batch import LOSS_MASK
from lmscale.errors import RunError
from lmscale.log import get_logger
from lmscale.models.context import ModelContext
from lmscale.models.loss import Loss, Observer
from lmscale.optim.adafactor import Adafactor
from lmscale.optim.build import set_rate, set_weight_decay
from lmscale.optim.muon import Muon
from lmscale.optim.row_adam import RowAdam
from lmscale.train.base import BaseModel
from lmscale.train.entries import weigh_entries
from lmscale.train.faults import Observed
from lmscale.train.fragments import Fragment, fragments
from lmscale.train.gradient_clipper import GradientClipper
from lmscale.train.update_gate import install_gate

_log = get_logger(__name__)

MicroBatch = dict[str, torch.Tensor]
Judge = Callable[[Observed], bool]
"""What a step shows before its update -> whether the update is withheld; the same on every rank."""


@dataclass(frozen=True)
class StepResult:
    """What an optimizer step did.

    loss is a float32 scalar tensor on the device: the mean over the global batch's counted labels, the same on every
    rank. grad_norm is the global L2 norm before clipping; inf where the step overflowed.
    """

    loss: torch.Tensor
    grad_norm: float
    loss_scale: float
    is_skipped: bool
    """Whether nothing was updated: an overflow, or withheld."""
    is_withheld: bool = False
    """Whether the judge said so."""


class Engine:
    """Trains a model built by `models.build` under DeepSpeed, by whole optimizer steps.

    Attributes:
        base: the checkpoint that is adapted, where its weights are not the engine's to save.
    """

    def __init__(
        self,
        model: nn.Module,
        context: ModelContext,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        deepspeed_config: dict[str, Any],
        max_grad_norm: float,
    ):
        """Wrap a model and its optimizer.

        Args:
            model: SequentialModel or PipelineModule.
            context: what its layers share.
            loss: its losses are weighted by what it counts.
            optimizer: a torch optimizer over the model's parameters.
            deepspeed_config: the resolved JSON.
            max_grad_norm: for ZeRO 0, where we clip; elsewhere the JSON's gradient_clipping does.
        Collectives: DeepSpeed broadcasts parameters; every rank must call.
        """
        self.context = context
        self.topology = context.topology
        self.base: BaseModel | None = None
        self.zero_stage = int(deepspeed_config.get("zero_optimization", {}).get("stage", 0))
        self._loss = loss
        self._clipper = None
        if self.zero_stage == 0:
            self._clipper = GradientClipper(model, context, max_grad_norm)
            optimizer.register_step_pre_hook(lambda *_: self._clipper.clip())
        mpu = None if _is_pipeline(model) else self.topology.mpu
        self.deepspeed, self.optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config, mpu=mpu
        )
        self.basic_optimizer = optimizer
        if isinstance(optimizer, Adafactor | Muon):
            self._describe_shares(optimizer)
        self._is_pipeline = isinstance(self.deepspeed, PipelineEngine)
        if self.zero_stage == 0 and self.topology.dp_size == 1 and not self._is_pipeline:
            self.deepspeed.enable_backward_allreduce = False
        self._growth = _DeferredGrowth(self.optimizer) if self.deepspeed.fp16_enabled() else None
        self._length: int | None = None
        self._judge: Judge | None = None
        self._observed: Observed | None = None
        self._is_withheld = False
        self._present: torch.Tensor | None = None
        self._step_loss: Callable[[], torch.Tensor] = lambda: torch.zeros(())
        if self._is_pipeline:
            self._aggregate_loss = self.deepspeed._aggregate_total_loss
            self.deepspeed._aggregate_total_loss = lambda: self._step_loss()
        measure = self._clipper.measure if self._clipper else lambda: 0.0
        install_gate(self.optimizer, optimizer, measure, self._withholds)

    @property
    def model(self) -> nn.Module:
        """The module under DeepSpeed's engine."""
        return self.deepspeed.module

    def fragments(self) -> list[Fragment]:
        """List this rank's part of the training state."""
        return fragments(
            self.model, self.optimizer, self.zero_stage, self.topology.tp_size, dp_rank=self.topology.dp_rank
        )

    def _describe_shares(self, optimizer: Adafactor | Muon) -> None:
        topology = self.topology
        everything = fragments(self.model, self.optimizer, self.zero_stage, topology.tp_size, with_empty=True)
        optimizer.describe(
            [fragment.share for fragment in everything if not fragment.is_frozen],
            tp_group=topology.tp_group if topology.tp_size > 1 else None,
            dp_group=topology.dp_group if topology.dp_size > 1 and self.zero_stage else None,
        )

    @property
    def reads_data(self) -> bool:
        """Whether this rank's stage needs micro batches."""
        return self.topology.is_first_stage or self.topology.is_last_stage

    @property
    def loss_scale(self) -> float:
        """The scale of the next step's loss; 1 but for fp16."""
        return float(self.optimizer.loss_scale) if self._growth else 1.0

    def train_step(
        self,
        micro_batches: list[MicroBatch],
        num_micro_batches: int,
        step: int,
        lr: float,
        weight_decay: float | None = None,
        seq_length: int | None = None,
        judge: Judge | None = None,
    ) -> StepResult:
        """Run forward and backward over the micro batches of one optimizer step, and the update.

        Args:
            micro_batches: this data-parallel rank's, on the CPU; empty on stages that read no data.
            num_micro_batches: their number, on every stage.
            step: number of the step, from 1; it seeds dropout.
            lr: the rate.
            weight_decay: of the groups that decay; None leaves them as they are.
            seq_length: nominal tokens of a sample; a pipeline is told, on every stage, where it may change.
            judge: asked between backward and update whether the update is withheld. Then no weight, no moment, no count and
                no loss scale moves, on any rank; without one, the update happens wherever DeepSpeed makes it.

        Raises:
            RunError: if an overflow comes at the lowest loss scale.
        Collectives: every rank must call with the same arguments but for the micro batches; with a judge, a maximum of
            four numbers over all ranks.
        """
        engine = self.deepspeed
        engine.train()
        self.context.dropout.begin_step(step)
        set_rate(self.optimizer, lr)
        if weight_decay is not None:
            set_weight_decay(self.optimizer, weight_decay)
        self._set_num_micro_batches(num_micro_batches)
        batches, present = self._weigh(micro_batches, num_micro_batches)
        if isinstance(self.basic_optimizer, RowAdam):
            self.basic_optimizer.present = present
        scale = self.loss_scale
        self._judge, self._present, self._observed, self._is_withheld = judge, present, None, False
        try:
            loss = self._train_pipeline(batches, seq_length) if self._is_pipeline else self._train_sequential(batches)
        except Exception as error:
            if "loss scale already at minimum" in str(error):
                raise RunError(
                    "gradients overflow at the lowest loss scale; the run cannot go on",
                    field="loss_scale.minimum",
                    value=self.loss_scale,
                    remedy="lower optim.lr, look at the data of this step, or use bf16",
                ) from None
            raise
        if present is not None:
            loss = loss / present.sum()
        skipped = self._is_withheld or bool(getattr(self.optimizer, "overflow", False))
        if self._growth:
            self._growth.apply()
        return StepResult(loss, self._grad_norm(skipped), scale, skipped, self._is_withheld)

    def _withholds(self, grad_norm: torch.Tensor | float, is_infinite: bool) -> bool:
        """Ask the step's judge, at the gate before the update.

        Collectives: a maximum of four numbers over all ranks.
        """
        if self._judge is None:
            return False
        loss = self._step_loss().double()
        if self._present is not None:
            loss = loss / self._present.sum()
        norm = torch.as_tensor(math.inf if is_infinite else grad_norm, dtype=torch.float64, device=loss.device)
        values = torch.stack([loss, norm.reshape(())])
        finite = values.isfinite()
        agreed = torch.cat([(~finite).double(), torch.where(finite, values, -math.inf)])
        dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
        bad_loss, bad_norm, loss_value, norm_value = agreed.tolist()
        is_overflow = self._growth is not None and bool(bad_norm) and not bad_loss
        self._observed = Observed(
            math.nan if bad_loss else loss_value, math.nan if bad_norm else norm_value, is_overflow
        )
        self._is_withheld = self._judge(self._observed)
        return self._is_withheld

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterator[MicroBatch] | None, num_micro_batches: int) -> tuple[float, float]:
        """Sum the loss of held-out micro batches over all data-parallel ranks.

        Returns:
            (summed loss, number of counted labels), on every rank.
        Collectives: every rank must call with the same num_micro_batches.
        """
        device = self.topology.device
        count = torch.zeros((), dtype=torch.float64, device=device)
        one = torch.tensor([1.0, 0.0], device=device)  # of tokens; sentence pairs are left out

        def prepared() -> Iterator[tuple[Any, Any]]:
            assert micro_batches is not None
            for micro_batch in micro_batches:
                count.add_(micro_batch[LOSS_MASK.name].sum().to(device))
                yield self._pack(micro_batch, one)

        self.deepspeed.eval()
        if self._is_pipeline:
            self._reset_wire(None)
            iterator = prepared() if self.reads_data else None
            mean = self.deepspeed.eval_batch(iterator, num_micro_batches=num_micro_batches, reduce_output="avg")
            total = mean.double() * num_micro_batches * self.topology.dp_size
            self._reset_wire(None)
        else:
            total = torch.zeros((), dtype=torch.float64, device=device)
            for inputs, labels in prepared():
                total += self._loss(self.deepspeed(_to(inputs, device)), _to(labels, device)).double()
            dist.all_reduce(total, group=self.topology.dp_group)
        dist.all_reduce(count, group=self.topology.dp_group)
        counts = count if self.reads_data else torch.zeros_like(count)
        dist.all_reduce(counts, op=dist.ReduceOp.MAX, group=self.topology.pp_group)
        self.deepspeed.train()
        return float(total), float(counts)

    def observe(
        self, micro_batches: Iterator[MicroBatch] | None, num_micro_batches: int, observer: Observer
    ) -> tuple[float, float]:
        """Evaluate, and show the observer the outputs and labels of each micro batch, on the last stage's ranks.

        Returns and Collectives: as of `evaluate`.
        """
        self._loss.observer = observer
        try:
            return self.evaluate(micro_batches, num_micro_batches)
        finally:
            self._loss.observer = None

    def parameter_norm(self) -> float:
        """Compute the global L2 norm of the master weights, each logical parameter counted once.

        Collectives: a sum over all ranks.
        """
        topology = self.topology
        square = torch.zeros((), dtype=torch.float64, device=topology.device)
        for fragment in self.fragments():
            if self.counts(fragment):
                square += fragment.master.float().norm().double().square().to(topology.device)
        dist.all_reduce(square)
        return math.sqrt(float(square))

    def counts(self, fragment: Fragment) -> bool:
        """Tell whether this rank is the one that counts a fragment: of copies on several ranks, one does."""
        topology = self.topology
        is_replica = fragment.tensor.tp_dim is None and topology.tp_rank > 0
        is_replica |= fragment.is_dp_copy or (self.zero_stage == 0 and topology.dp_rank > 0)
        return not fragment.is_tied_copy and not is_replica

    def maximum(self, value: float) -> float:
        """Return the largest of a number over all ranks.

        Collectives: a maximum over all ranks.
        """
        largest = torch.tensor(float(value), dtype=torch.float64, device=self.topology.device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return largest.item()

    def peak_bytes(self) -> int:
        """Return the most memory that this rank has held: allocated on a GPU, resident in the process on a CPU."""
        return peak_bytes(self.topology.device)

    def _train_sequential(self, batches: list[tuple[Any, Any]]) -> torch.Tensor:
        engine, device = self.deepspeed, self.topology.device
        engine.micro_steps = 0
        total = torch.zeros((), dtype=torch.float32, device=device)
        self._step_loss = functools.cache(lambda: self._mean_over_data(total / len(batches)))
        for inputs, labels in batches:
            loss = self._loss(engine(_to(inputs, device)), _to(labels, device))
            engine.backward(loss)
            total += loss.detach()
            engine.step()
        return self._step_loss()

    def _mean_over_data(self, total: torch.Tensor) -> torch.Tensor:
        if self.topology.dp_size > 1:
            dist.all_reduce(total, group=self.topology.dp_group)
            total /= self.topology.dp_size
        return total

    def _train_pipeline(self, batches: list[tuple[Any, Any]], seq_length: int | None) -> torch.Tensor:
        # A stage in the middle reads no batch: it is told the length, or it would receive into buffers of the last one.
        self._reset_wire(seq_length)
        self._step_loss = functools.cache(lambda: self._aggregate_loss().detach().reshape(()))
        loss = self.deepspeed.train_batch(iter(batches) if self.reads_data else None)
        return loss.detach().reshape(())

    def _reset_wire(self, length: int | None) -> None:
        """Let the pipeline announce the shapes of what it sends anew, where the length may have changed."""
        if length is None or length != self._length:
            self.deepspeed.reset_activation_shape()
            self._length = length

    def _weigh(
        self, micro_batches: list[MicroBatch], num_micro_batches: int
    ) -> tuple[list[tuple[Any, Any]], torch.Tensor | None]:
        """Pack micro batches with the weight that makes the loss a mean over the global batch's labels.

        Returns:
            The packed ones, and which of several adaptations they train (`weigh_entries`).
        """
        weighed, present = micro_batches, None
        if self.context.num_adaptations > 1:
            weighed, present = weigh_entries(micro_batches, self.context.num_adaptations, self.topology)
        if not self.reads_data:
            return [], present
        device, dp_size = self.topology.device, self.topology.dp_size
        counts = torch.stack([self._loss.counts(batch) for batch in micro_batches]).sum(dim=0).to(device)
        if dp_size > 1:
            dist.all_reduce(counts, group=self.topology.dp_group)
        weight = dp_size * num_micro_batches / counts.clamp(min=1.0)
        return [self._pack(batch, weight) for batch in weighed], present

    def _pack(self, batch: MicroBatch, weight: torch.Tensor) -> tuple[Any, Any]:
        inputs = tuple(batch[name] for name in self.context.wire.input_names)
        labels = (*(batch[name] for name in self.context.wire.label_names), weight)
        return (inputs if len(inputs) > 1 else inputs[0]), labels

    def _set_num_micro_batches(self, num_micro_batches: int) -> None:
        engine = self.deepspeed
        if engine.gradient_accumulation_steps() != num_micro_batches:
            engine.set_train_batch_size(
                engine.train_micro_batch_size_per_gpu() * num_micro_batches * self.topology.dp_size
            )

    def _grad_norm(self, skipped: bool) -> float:
        if self._observed is not None and not self._observed.is_overflow:
            return self._observed.grad_norm  # read at the gate already
        if skipped:
            return math.inf
        if self._clipper is not None:
            return self._clipper.norm
        return float(self.deepspeed.get_global_grad_norm())


class _DeferredGrowth:
    """Holds back the growth of the loss scale until the step that earned it has used the scale it was computed with."""

    def __init__(self, optimizer: Any):
        self._scaler = optimizer.loss_scaler
        self._pending: float | None = None
        optimizer._update_scale = self._update

    def _update(self, has_overflow: bool = False) -> None:
        before = self._scaler.cur_scale
        self._scaler.update_scale(has_overflow)
        if self._scaler.cur_scale > before:
            self._pending, self._scaler.cur_scale = self._scaler.cur_scale, before

    def apply(self) -> None:
        """Let the scale grow now."""
        if self._pending is not None:
            self._scaler.cur_scale, self._pending = self._pending, None


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this process has held on a device, as `Engine.peak_bytes` does."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _is_pipeline(model: nn.Module) -> bool:
    from deepspeed.runtime.pipe.module import PipelineModule

    return isinstance(model, PipelineModule)


def _to(tensors: Any, device: torch.device) -> Any:
    if isinstance(tensors, tuple):
        return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)
    return tensors.to(device, non_blocking=True)
