"""The rules that hold between the sections of a run, and between a run and the ranks that it is started on."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.adapt_rules import ADAPT_RULES, check_adaptation
from lmscale.config.data import split_shares
from lmscale.config.fault_rules import FAULT_RULES
from lmscale.config.implementation import choose_implementation, choose_norms
from lmscale.config.layouts import Layout, check_layout
from lmscale.config.model_rules import MODEL_RULES
from lmscale.config.monitor_rules import MONITOR_RULES, check_traced_ranks
from lmscale.config.optim_rules import OPTIM_RULES
from lmscale.config.probing_rules import PROBING_RULES
from lmscale.config.prompt_rules import PROMPT_RULES
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.config.task_rules import TASK_RULES
from lmscale.config.validation import check_divides
from lmscale.errors import ConfigError


def check_run(config: RunConfig, zero: ZeroChoice, world_size: int, *, elsewhere: bool = False) -> None:
    """Check the rules between sections, for a number of ranks.

    Args:
        config: the run.
        zero: what its DeepSpeed keys say.
        world_size: ranks.
        elsewhere: the run is planned for other machines than this one, so what is installed here does not matter.

    Raises:
        ConfigError: the first rule that does not hold, with the values and a remedy.
    """
    for rule in (_length_is_given, *CROSS_SECTION_RULES):
        rule(config)
    check_adaptation(config, zero)
    check_traced_ranks(config, world_size)
    _tokenizer_is_there(config)
    choose_implementation(config.optim, zero, has_gpu=None, elsewhere=elsewhere)
    choose_norms(config.train, has_gpu=None, elsewhere=elsewhere)
    check_layout(
        Layout(
            zero_stage=zero.stage,
            pp_size=config.parallel.pp_size,
            tp_size=config.parallel.tp_size,
            sequence_parallel=config.parallel.sequence_parallel,
            precision=config.precision,
            offload_optimizer=zero.offload_optimizer,
            offload_param=zero.offload_param,
            optimizer=config.optim.name,
        )
    )
    dp_size_of(config, world_size)


def _length_is_given(config: RunConfig) -> None:
    if config.train.train_tokens == 0:
        raise ConfigError(
            "is required and missing",
            field="train.train_tokens",
            remedy="add it" if config.task is None else "add it, or train.epochs",
        )


def _tokenizer_is_there(config: RunConfig) -> None:
    """Ask for the tokenizer where training needs it; weights alone do without."""
    if config.objective.name != "causal_lm" and config.tokenizer is None:
        raise ConfigError(
            f"is required by objective {config.objective.name}, for its special ids",
            field="tokenizer",
            remedy="add the section",
        )


def dp_size_of(config: RunConfig, world_size: int) -> int:
    """Compute the data-parallel size and check that the batch divides over it.

    Raises:
        ConfigError: if the ranks, or the batch, do not divide.
    """
    parallel, batch = config.parallel, config.batch
    model_ranks = parallel.tp_size * parallel.pp_size
    if world_size % model_ranks:
        raise ConfigError(
            f"must be a multiple of parallel.tp_size x parallel.pp_size = {parallel.tp_size} x {parallel.pp_size}",
            field="ranks",
            value=world_size,
            remedy=f"start {max(1, world_size // model_ranks) * model_ranks} ranks, or change the layout",
        )
    dp_size = world_size // model_ranks
    quantum = batch.micro_batch_size * dp_size
    check_divides(
        "batch.global_batch_size",
        batch.global_batch_size,
        quantum,
        f"batch.micro_batch_size x dp_size = {batch.micro_batch_size} x {dp_size} = {quantum}",
    )
    if batch.ramp is not None:
        check_divides("batch.ramp.start", batch.ramp.start, quantum, f"batch.micro_batch_size x dp_size = {quantum}")
        check_divides(
            "batch.ramp.increment", batch.ramp.increment, quantum, f"batch.micro_batch_size x dp_size = {quantum}"
        )
    for number, stage in enumerate(batch.stages):
        check_divides(
            f"batch.stages.{number}.batch_size",
            stage.batch_size,
            quantum,
            f"batch.micro_batch_size x dp_size = {quantum}",
        )
    return dp_size


def _corpora_are_distinct(config: RunConfig) -> None:
    for key, values in (
        ("data.valid.name", [source.name for source in config.data.valid]),
        ("data.train.prefix", [source.prefix for source in config.data.train]),
    ):
        repeated = sorted({value for value in values if values.count(value) > 1})
        if repeated:
            raise ConfigError("is given twice", field=key, value=repeated[0])
    split_shares(config.data.split)


CROSS_SECTION_RULES: tuple[Callable[[RunConfig], None], ...] = (
    *TASK_RULES,
    *PROMPT_RULES,  # before what asks for lengths, which a prompt shortens
    *PROBING_RULES,
    *MODEL_RULES,
    *OPTIM_RULES,
    *ADAPT_RULES,
    *FAULT_RULES,
    *MONITOR_RULES,
    _corpora_are_distinct,
)
