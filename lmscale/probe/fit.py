"""Training a classifier on features: one process, one order, the run's optimizer and schedules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.feed.task_rows import shuffled_rows
from lmscale.monitor import metrics
from lmscale.monitor.metrics import Record
from lmscale.optim.batch_ramp import sizes_of
from lmscale.optim.build import build_optimizer, set_rate, set_weight_decay
from lmscale.optim.lr import lr_at, weight_decay_at
from lmscale.optim.steps import Steps
from lmscale.plan.groups import group_of
from lmscale.plan.probing import PROBE
from lmscale.probe.heads import ProbeHead
from lmscale.probe.units import Units
from lmscale.probe.watch import Watch
from lmscale.train.best import Best

TRAIN, DEV = "train", "dev"
_UNITS_AT_A_TIME = 512
Values = dict[str, float]
_NOBODY = Watch()


@dataclass(frozen=True)
class Problem:
    """What a classifier learns.

    Attributes:
        features: fp32 [u, ...] of each split, on the CPU.
        units: of each split.
        targets: of each split, [u]: int64 classes or float32 numbers; int64 [u, 2] first and last places.
        measure: a split's name and its outputs [u, c], of places [u, 2, s] -> metrics.
        metric: of them, the one that decides on dev.
    """

    features: dict[str, torch.Tensor]
    units: dict[str, Units]
    targets: dict[str, NDArray[Any]]
    measure: Callable[[str, NDArray[np.float32]], Values]
    metric: str


@dataclass(frozen=True)
class Fitted:
    """A trained classifier.

    Attributes:
        head: with the weights of the best step.
        steps: that were trained.
        best_step: of the best value of the metric on dev; the last without dev.
        splits: metrics of every split but train.
    """

    head: ProbeHead
    steps: int
    best_step: int
    splits: dict[str, Values]


def fit(
    problem: Problem,
    head: ProbeHead,
    config: RunConfig,
    device: torch.device,
    watch: Watch = _NOBODY,
) -> Fitted:
    """Train a classifier, and measure it with the best weights.

    Step i takes the rows that step i of fine-tuning takes, at the same rate: order, batch, schedules, train.epochs,
    train.eval_interval and task.patience are the run's. The loss is the mean cross entropy, or squared error, over the
    units of the batch; arithmetic is fp32.

    Args:
        problem: what is learned.
        head: to train, on the CPU.
        config: of the run.
        device: where to compute.
        watch: told of every train.log_interval-th step and of every evaluation.

    Raises:
        Stopped: if the watch says so.
    """
    trainer = _Trainer(problem, head.to(device), config, device)
    assert config.task is not None
    best = Best(problem.metric, config.task.patience)
    weights: dict[str, torch.Tensor] | None = None
    number = 0
    for number, is_last in trainer.steps(watch.tick):
        interval, values = config.train.eval_interval, {}
        if DEV in problem.units and (is_last or (interval and number % interval == 0)):
            measured = trainer.measure(DEV)
            values = {f"valid/{DEV}/{name}": value for name, value in measured.items()}
            if best.update(number, measured):
                weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        ends = is_last or best.is_exhausted
        if ends or number % config.train.log_interval == 0:
            values |= trainer.take_values()
        if values:
            watch.record(Record(number, trainer.consumed_samples, trainer.consumed_tokens, values))
        if ends:
            break
    if weights is not None:
        head.load_state_dict(weights)
    splits = {name: trainer.measure(name) for name in problem.units if name != TRAIN}
    return Fitted(head.cpu().eval(), number, number if best.step is None else best.step, splits)


class _Trainer:
    """Steps of one classifier."""

    def __init__(self, problem: Problem, head: ProbeHead, config: RunConfig, device: torch.device):
        self._problem, self._head, self._config, self._device = problem, head, config, device
        groups = [_group(name, parameter, config) for name, parameter in head.named_parameters()]
        self._optimizer = build_optimizer(groups, config.optim, device, ZeroChoice())
        self.consumed_samples = self.consumed_tokens = 0
        self._losses: list[float] = []
        self._last: Values = {}

    def take_values(self) -> Values:
        """Return the mean loss of the steps since the last call, and what the last step had."""
        losses, self._losses = self._losses, []
        return {**({metrics.TRAIN_LM_LOSS: float(np.mean(losses))} if losses else {}), **self._last}

    def steps(self, tick: Callable[[], None]) -> Any:
        """Train step by step, and yield (number of the step from 1, whether it is the last)."""
        config = self._config
        units, train_tokens = self._problem.units[TRAIN], config.train.train_tokens
        num_rows = len(units.starts) - 1
        for number, step in enumerate(Steps(sizes_of(config), 0, 0, train_tokens), 1):
            tick()
            self.consumed_samples += step.batch_size
            self.consumed_tokens += step.batch_size * step.seq_length
            clock = (self.consumed_tokens, config.optim, train_tokens)
            rate = lr_at(*clock)
            self._last = {metrics.TRAIN_LR: rate, metrics.TRAIN_GLOBAL_BATCH_SIZE: step.batch_size}
            set_rate(self._optimizer, rate)
            set_weight_decay(self._optimizer, weight_decay_at(*clock))
            samples = np.arange(step.first_sample, step.first_sample + step.batch_size)
            self._update(units.of_rows(shuffled_rows(samples, config.train.seed, num_rows)))
            is_last = self.consumed_tokens >= train_tokens or number == config.train.stop_at_step
            yield number, is_last
            if is_last:
                return

    def _update(self, numbers: NDArray[np.int64]) -> None:
        if not len(numbers):
            return
        loss = _loss(self._outputs(TRAIN, numbers), self._targets(TRAIN, numbers))
        self._optimizer.zero_grad()
        loss.backward()
        most = self._config.optim.max_grad_norm or float("inf")
        self._last[metrics.TRAIN_GRAD_NORM] = float(nn.utils.clip_grad_norm_(self._head.parameters(), most))
        self._losses.append(float(loss.detach()))
        self._optimizer.step()

    @torch.no_grad()
    def measure(self, split: str) -> Values:
        """Measure a split: `loss`, and the metrics."""
        count = self._problem.units[split].num_units
        parts = [
            self._outputs(split, np.arange(first, min(first + _UNITS_AT_A_TIME, count)))
            for first in range(0, count, _UNITS_AT_A_TIME)
        ]
        outputs = torch.cat(parts)
        loss = float(_loss(outputs, self._targets(split, np.arange(count))))
        return {"loss": loss, **self._problem.measure(split, outputs.cpu().numpy())}

    def _outputs(self, split: str, numbers: NDArray[np.int64]) -> torch.Tensor:
        features = self._problem.features[split][torch.from_numpy(numbers)].to(self._device)
        is_token = None
        finds_places = self._problem.targets[split].ndim == 2
        if self._head.query is not None or finds_places:
            is_token = torch.from_numpy(self._problem.units[split].is_token[numbers]).to(self._device)
        outputs: torch.Tensor = self._head(features, is_token)
        if not finds_places:
            return outputs
        assert is_token is not None
        return outputs.transpose(1, 2).masked_fill(~is_token[:, None], torch.finfo(outputs.dtype).min)

    def _targets(self, split: str, numbers: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(self._problem.targets[split][numbers]).to(self._device)


def _loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if targets.is_floating_point():
        return F.mse_loss(outputs[:, 0], targets)
    if outputs.dim() == 3:
        return F.cross_entropy(outputs.transpose(1, 2), targets)
    return F.cross_entropy(outputs, targets)


def _group(name: str, parameter: nn.Parameter, config: RunConfig) -> dict[str, Any]:
    """Put a parameter into a group of its own; matrices alone are decayed, as everywhere."""
    group = group_of(f"{PROBE}.{name}", parameter.dim(), config.optim)
    return {
        "name": f"{PROBE}.{name}",
        "params": [parameter],
        "weight_decay": config.optim.weight_decay * group.weight_decay_multiplier,
        "weight_decay_multiplier": group.weight_decay_multiplier,
        "lr_multiplier": group.lr_multiplier,
        "is_hidden_matrix": False,
    }
