"""The layouts that a run may have on a number of devices. Legality is asked of config.check and config.layouts alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lmscale.config.adapt import prefix_length
from lmscale.config.check import check_run, dp_size_of
from lmscale.config.implementation import choose_implementation
from lmscale.config.layouts import Layout, broken_rule
from lmscale.config.objective import CausalLMConfig
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError
from lmscale.plan.activations import StepShape

LARGEST_MICRO_BATCH = 64
Refusal = tuple[str, ConfigError]
"""A shape that is not legal, and the rule that it breaks."""


@dataclass(frozen=True)
class Candidate:
    """A layout: what a run's config and its DeepSpeed JSON can choose while the losses stay the same."""

    step: StepShape
    dp_size: int
    zero: ZeroChoice

    def __str__(self) -> str:
        step, zero = self.step, self.zero
        parts = [f"TP {step.tp_size} x PP {step.pp_size} x DP {self.dp_size}", f"ZeRO {zero.stage}"]
        parts += [f"micro batch {step.micro_batch_size}", f"recompute {step.recompute}"]
        parts += ["sequence parallelism"] if step.sequence_parallel else []
        parts += ["optimizer offload"] if zero.offload_optimizer else []
        return ", ".join(parts + (["parameter offload"] if zero.offload_param else []))


@dataclass(frozen=True)
class Shape:
    """How the ranks are laid out, before ZeRO and recompute."""

    config: RunConfig
    """The run with the shape's `parallel` section."""
    dp_size: int
    micro_batch_sizes: tuple[int, ...]
    """Ascending."""


def step_shape(config: RunConfig, dp_size: int, *, device_type: str, batch_size: int | None = None) -> StepShape:
    """Describe the steps of a run, as it is laid out, to the planner.

    Args:
        config: the run.
        dp_size: data-parallel ranks.
        device_type: cuda or cpu.
        batch_size: of the step, in a batch ramp; left out, batch.global_batch_size.
    """
    parallel, micro, model = config.parallel, config.batch.micro_batch_size, config.model
    is_prefix_lm = isinstance(config.objective, CausalLMConfig) and config.objective.prefix_lm
    has_mask = model.architecture == "gpt" and (config.data.reset_attention_mask or is_prefix_lm)
    return StepShape(
        lengths=config.lengths,
        micro_batch_size=micro,
        num_micro_batches=max(1, (batch_size or config.batch.global_batch_size) // (micro * dp_size)),
        tp_size=parallel.tp_size,
        pp_size=parallel.pp_size,
        sequence_parallel=parallel.sequence_parallel,
        recompute=parallel.recompute,
        precision=config.precision,
        # Torch's fused kernels take a mask, or queries that share keys; of those that a GPU has, none takes both.
        kernel_keeps_scores=has_mask and model.query_groups < model.num_attention_heads,
        has_mask=has_mask,
        device_type=device_type,
        prefix_length=prefix_length(config.adapt),
        prefix_dropout=bool(prefix_length(config.adapt) and getattr(config.adapt, "dropout", 0.0)),
    )


def shapes(config: RunConfig, num_devices: int, devices_per_node: int) -> tuple[list[Shape], list[Refusal]]:
    """List the legal TP x PP x DP, with and without sequence parallelism, and why the others are not.

    Tensor parallelism stays inside a node: its collectives, several in a layer, would be the slowest part of any step.
    """
    found: list[Shape] = []
    refusals: list[Refusal] = []
    for tp_size in _divisors(num_devices, devices_per_node):
        for pp_size in _divisors(num_devices // tp_size, num_devices):
            for sequence_parallel in (False, True) if tp_size > 1 else (False,):
                try:
                    found.append(_shape(config, num_devices, tp_size, pp_size, sequence_parallel))
                except ConfigError as error:
                    dp_size = num_devices // (tp_size * pp_size)
                    refusals.append((f"TP {tp_size} x PP {pp_size} x DP {dp_size}", error))
    return found, refusals


def _shape(config: RunConfig, num_devices: int, tp_size: int, pp_size: int, sequence_parallel: bool) -> Shape:
    update = {"tp_size": tp_size, "pp_size": pp_size, "sequence_parallel": sequence_parallel}
    parallel = config.parallel.model_copy(update=update)
    laid_out = with_micro_batch(config.model_copy(update={"parallel": parallel}), 1)
    check_run(laid_out, ZeroChoice(stage=1), num_devices, elsewhere=True)
    dp_size = dp_size_of(laid_out, num_devices)
    return Shape(laid_out, dp_size, tuple(_micro_batch_sizes(laid_out, num_devices, dp_size)))


def _micro_batch_sizes(config: RunConfig, num_devices: int, dp_size: int) -> Iterator[int]:
    """Yield powers of two, and the whole batch of a rank, where the batch and its ramp divide."""
    whole = config.batch.global_batch_size // dp_size
    sizes = {2**power for power in range(LARGEST_MICRO_BATCH.bit_length())} | {whole}
    for size in sorted(size for size in sizes if size <= min(whole, LARGEST_MICRO_BATCH)):
        try:
            dp_size_of(with_micro_batch(config, size), num_devices)
        except ConfigError:
            continue
        yield size


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """Return the run with another micro batch."""
    return config.model_copy(update={"batch": config.batch.model_copy(update={"micro_batch_size": size})})


def zero_choices(shape: Shape, own: ZeroChoice | None = None) -> Iterator[list[ZeroChoice]]:
    """Yield what each legal ZeRO stage may leave on the device: all, then less and less, each where it is legal.

    Args:
        shape: the shape.
        own: what the run's DeepSpeed keys say, of which stage and offload are not read; left out, DeepSpeed's defaults.

    On one data-parallel rank no stage splits anything, so the lowest legal one and offload are all there is.
    """
    choices = [
        [choice for choice in _of_stage(stage, own or ZeroChoice()) if _is_legal(shape.config, choice)]
        for stage in range(4)
    ]
    legal = [some for some in choices if some]
    if shape.dp_size == 1:
        plain = [some for some in legal if not some[0].offload_optimizer][:1]
        offloaded = [choice for some in legal for choice in some if choice.offload_optimizer]
        legal = [[*plain[0], *(choice for choice in offloaded if choice not in plain[0])]]
    yield from legal


def _is_legal(config: RunConfig, zero: ZeroChoice) -> bool:
    if broken_rule(_layout(config, zero)) is not None:
        return False
    try:
        choose_implementation(config.optim, zero, has_gpu=None, elsewhere=True)
    except ConfigError:
        return False
    return True


def _of_stage(stage: int, own: ZeroChoice) -> list[ZeroChoice]:
    return [
        own.model_copy(update={"stage": stage, "offload_optimizer": optimizer, "offload_param": parameters})
        for optimizer, parameters in ((False, False), (True, False), (True, True))
    ]


def _layout(config: RunConfig, zero: ZeroChoice) -> Layout:
    return Layout(
        zero_stage=zero.stage,
        pp_size=config.parallel.pp_size,
        tp_size=config.parallel.tp_size,
        sequence_parallel=config.parallel.sequence_parallel,
        precision=config.precision,
        offload_optimizer=zero.offload_optimizer,
        offload_param=zero.offload_param,
        optimizer=config.optim.name,
    )


def _divisors(number: int, largest: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, largest) + 1) if number % divisor == 0]
