"""A small copy of a run that makes the same choices: what decides whether a layout is right stays, sizes go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lmscale.config.adapt import ProbingConfig
from lmscale.config.check import check_run
from lmscale.config.deepspeed_json import load_deepspeed
from lmscale.config.lengths import sample_lengths
from lmscale.config.model import VOCAB_MULTIPLE, ModelConfig
from lmscale.config.objective import BertConfig
from lmscale.config.optim import CooldownConfig, RewarmupConfig
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError
from lmscale.plan.adaptation import Adaptation, adaptation_of
from lmscale.plan.groups import matches
from lmscale.verify.adapted import first_examples, notes_of_adaptation, shrink_adaptation
from lmscale.verify.layouts import Candidate

MICRO_BATCH_SIZE = 2
MIN_GLOBAL_BATCH_SIZE = 8
MIN_SEQ_LENGTH = 32
MIN_LAYERS = 2
MIN_QUERY_GROUPS = 2
WIDTH = 64
"""Width of the model, or of the heads together if that is the smaller, where the ratios allow it."""
VOCAB_SIZE = 2 * VOCAB_MULTIPLE
BUCKET_ELEMENTS = 20_000
"""Size of DeepSpeed's buckets, so that a small model has several, as a large one has."""
PERSISTENT_ELEMENTS = 1_000
"""Parameters from this size on are partitioned by ZeRO 3: matrices and embeddings, as at full size."""


def shrink(
    config: RunConfig, candidates: Sequence[Candidate], steps: int, precision: str
) -> tuple[RunConfig, list[str]]:
    """Make the small copy.

    Kept: architecture, norms, activation, positions, tied head, biases, initialization; the ratios of query to
    key/value heads and of feed-forward to hidden width; whether layers, heads, widths and sequence divide over the
    candidates' ranks, and whether the vocabulary is padded (the vocabulary itself, but for causal_lm); objective,
    document isolation, recompute, optimizer, peak rate, clipping; the schedule, in shares of the run. A batch ramp
    becomes one of two stages.

    Args:
        config: the user's run, its task resolved (`lmscale.tasks.resolve`).
        candidates: the layouts that the copy will be trained on.
        steps: optimizer steps.
        precision: of the copy.

    Returns:
        The copy, and in a line each what it does otherwise than the run.
    """
    if isinstance(config.adapt, ProbingConfig):
        raise ConfigError(
            "trains nothing on the ranks: they compute features, and one of them trains a classifier",
            field="adapt.method",
            value="probing",
            remedy="verify the base's run",
        )
    keys = config.model_dump()
    tp_multiple = math.lcm(*(candidate.tp_size for candidate in candidates))
    pp_multiple = math.lcm(*(candidate.pp_size for candidate in candidates))
    dp_multiple = math.lcm(*(candidate.dp_size for candidate in candidates))
    keys["model"] |= _model(config.model, tp_multiple, pp_multiple)
    keys["model"]["init_from"] = config.model.init_from if config.adapt or config.task else None
    keys["adapt"] = shrink_adaptation(config, keys["model"]["num_layers"])
    seq_length = _smallest_alike(config.data.seq_length, tp_multiple, MIN_SEQ_LENGTH)
    if config.task is not None:  # examples are as long as they are
        seq_length = config.data.seq_length
        keys["task"] |= first_examples(config.task)
        keys["train"] |= {"epochs": None}
        keys["optim"] |= {"lr_warmup_fraction": None}
    else:
        positions = max(seq_length, config.model.max_position_embeddings * seq_length // config.data.seq_length)
        keys["model"]["max_position_embeddings"] = positions + (keys["adapt"] or {}).get("length", 0)
        decoder = _decoder_seq_length(config, seq_length, tp_multiple)
        keys["data"] |= {"seq_length": seq_length, "decoder_seq_length": decoder}
        keys["data"] |= {"valid": [], "split": "1,0,0"}
    keys["data"] |= {"seq_length_stages": [], "num_workers": 0}
    if config.objective.name == "causal_lm" and config.task is None:
        keys["tokenizer"] = None
    else:  # its special ids are what the objective works with
        keys["model"]["vocab_size"] = config.model.vocab_size
    if isinstance(config.objective, BertConfig) and config.objective.max_predictions is not None:
        places = config.objective.max_predictions * seq_length // config.data.seq_length
        keys["objective"]["max_predictions"] = max(1, places)
    keys["batch"] = _batch(config, dp_multiple)
    unchecked = {**keys, "optim": {**keys["optim"], "groups": []}}
    nominal = RunConfig.model_validate(unchecked).lengths.nominal
    step_tokens = keys["batch"]["global_batch_size"] * nominal
    train_tokens = steps * step_tokens
    if config.data.seq_length_stages and steps > 1:
        multiple = math.gcd(seq_length, tp_multiple)
        shorter = max(multiple, seq_length // 2 // multiple * multiple)
        stage = {"seq_length": shorter, "until_tokens": 1}  # the first step alone
        keys["data"]["seq_length_stages"] = [stage] if shorter < seq_length else []
    keys["optim"] |= _schedule(config, train_tokens, steps)
    shrunk = ModelConfig.model_validate(keys["model"])
    names = (adaptation_of(RunConfig.model_validate(unchecked)) or Adaptation(shrunk)).shapes()
    keys["optim"]["groups"] = [
        rule.model_dump() for rule in config.optim.groups if any(matches(rule, name) for name in names)
    ]
    if config.optim.name == "adafactor":  # its matrices stay factored
        smallest = min(shrunk.hidden_size, shrunk.query_groups * shrunk.head_size, shrunk.ffn_size)
        keys["optim"]["adafactor_min_dim"] = min(config.optim.adafactor_min_dim, smallest)
    if config.optim.name == "muon":  # in bf16 a rounding of a gradient shows in the losses
        keys["optim"]["muon_precision"] = "fp32"
    keys["train"] |= {"train_tokens": train_tokens, "stop_at_step": steps, "log_interval": 1, "eval_interval": 0}
    keys["train"] |= {"compile": False, "fused_norms": "auto"}
    keys["optim"]["implementation"] = "auto"
    keys["checkpoint"] = {"save_interval": 0, "resume": "never"}
    keys["monitor"] = {"tensorboard": False}
    keys["precision"] = precision
    keys["loss_scale"] = keys["loss_scale"] if precision == "fp16" else None
    keys["deepspeed"] = _deepspeed(config, precision)
    return RunConfig.model_validate(keys), _notes(config, precision)


def lay_out(config: RunConfig, candidate: Candidate) -> RunConfig:
    """Put a shrunk run on a layout.

    Raises:
        ConfigError: if it does not fit: heads, layers or the sequence do not divide.
    """
    keys = config.model_dump()
    keys["parallel"] |= {
        "tp_size": candidate.tp_size,
        "pp_size": candidate.pp_size,
        "sequence_parallel": candidate.sequence_parallel,
    }
    if candidate.recompute is not None:
        keys["parallel"]["recompute"] = candidate.recompute
    keys["deepspeed"]["zero_optimization"]["stage"] = candidate.zero_stage
    placed = RunConfig.model_validate(keys)
    check_run(placed, ZeroChoice(stage=candidate.zero_stage), candidate.num_ranks)
    return placed


def fits(config: RunConfig, candidate: Candidate) -> bool:
    """Tell whether a shrunk run can be put on a layout."""
    try:
        lay_out(config, candidate)
    except ConfigError:
        return False
    return True


def _decoder_seq_length(config: RunConfig, seq_length: int, tp_multiple: int) -> int | None:
    """Shorten the decoder's length as the encoder's was; it divides over the ranks where the run's does."""
    decoder = config.lengths.decoder
    if not decoder:
        return None
    data = config.data.model_copy(update={"seq_length": seq_length, "decoder_seq_length": None})
    least = sample_lengths(data, config.objective).decoder
    shared = math.gcd(decoder, tp_multiple)
    return next(n for n in range(least, least + tp_multiple + 1) if math.gcd(n, tp_multiple) == shared)


def _smallest_alike(size: int, multiple: int, at_least: int) -> int:
    """Find the smallest n from at_least on that shares with `multiple` the divisors that `size` shares with it."""
    shared = math.gcd(size, multiple)
    return next((n for n in range(at_least, size) if math.gcd(n, multiple) == shared), size)


def _model(model: ModelConfig, tp_multiple: int, pp_multiple: int) -> dict[str, Any]:
    groups = _smallest_alike(model.query_groups, tp_multiple, MIN_QUERY_GROUPS)
    heads = groups * (model.num_attention_heads // model.query_groups)
    ratio = model.hidden_size / (model.num_attention_heads * model.head_size)
    width = round(WIDTH * max(1.0, 1 / ratio))
    head_size = min(model.head_size, max(4, width // heads // 2 * 2))
    hidden_size = max(1, round(ratio * heads * head_size))
    ffn_size = max(1, round(hidden_size * model.ffn_size / model.hidden_size))
    is_padded = model.vocab_size % VOCAB_MULTIPLE != 0
    return {
        "preset": None,
        "init_from": None,
        "num_layers": _smallest_alike(model.num_layers, pp_multiple, MIN_LAYERS),
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_query_groups": None if model.num_query_groups is None else groups,
        "head_dim": None if model.head_dim is None else head_size,
        "ffn_hidden_size": _nearest_alike(ffn_size, model.ffn_size, tp_multiple),
        "vocab_size": min(model.vocab_size, VOCAB_SIZE - 6 if is_padded else VOCAB_SIZE),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "ffn_dropout": 0.0,
    }


def _nearest_alike(wanted: int, size: int, multiple: int) -> int:
    """Find the number nearest to `wanted` that shares with `multiple` the divisors that `size` shares with it."""
    shared = math.gcd(size, multiple)
    return next(
        n
        for distance in range(2 * multiple + 1)
        for n in (wanted - distance, wanted + distance)
        if n > 0 and math.gcd(n, multiple) == shared
    )


def _batch(config: RunConfig, dp_multiple: int) -> dict[str, Any]:
    size = math.lcm(MIN_GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE * dp_multiple)
    if config.batch.ramp is None and not config.batch.stages:
        return {"micro_batch_size": MICRO_BATCH_SIZE, "global_batch_size": size}
    # Two steps of half the batch come first: the number of micro batches changes on the way.
    ramp = {"start": size, "increment": size, "ramp_samples": 2 * size}
    return {"micro_batch_size": MICRO_BATCH_SIZE, "global_batch_size": 2 * size, "ramp": ramp}


def _schedule(config: RunConfig, train_tokens: int, steps: int) -> dict[str, Any]:
    optim, share = config.optim, train_tokens / config.train.train_tokens
    warmup_tokens = int(optim.lr_warmup_tokens * share)
    if optim.lr_decay_style == "inverse_sqrt":  # a share of it would be over, and the rate low, at the first step
        warmup_tokens = max(warmup_tokens, train_tokens // steps)
    decay_tokens = optim.lr_decay_tokens and max(warmup_tokens + 1, int(optim.lr_decay_tokens * share))
    cooldown_tokens = optim.lr_cooldown_tokens and max(1, int(optim.lr_cooldown_tokens * share))
    return {
        "lr_warmup_tokens": min(warmup_tokens, train_tokens - 1),
        "lr_decay_tokens": decay_tokens,
        "lr_cooldown_tokens": cooldown_tokens,
        **{
            name: _shrunk_part(getattr(optim, name), warmup_tokens, train_tokens, config.train.train_tokens)
            for name in ("lr_cooldown", "lr_rewarmup")
        },
    }


def _shrunk_part(
    part: CooldownConfig | RewarmupConfig | None, warmup_tokens: int, small: int, full: int
) -> dict[str, Any] | None:
    """Move a part of the schedule to its share of the small run, behind the warm-up."""
    if part is None:
        return None
    begin = max(1, warmup_tokens, part.start_tokens * small // full)
    behind = (part.start_tokens + part.tokens) * small // full
    return part.model_dump() | {"start_tokens": begin, "tokens": max(1, behind - begin)}


def _deepspeed(config: RunConfig, precision: str) -> dict[str, Any]:
    """Keep what the run's JSON says of ZeRO and of gradient types, with small buckets and without offload."""
    given = load_deepspeed(config.deepspeed)
    zero = {
        key: value for key, value in (given.get("zero_optimization") or {}).items() if not key.startswith("offload_")
    }
    zero |= {
        "reduce_bucket_size": BUCKET_ELEMENTS,
        "allgather_bucket_size": BUCKET_ELEMENTS,
        "sub_group_size": BUCKET_ELEMENTS,
        "stage3_prefetch_bucket_size": BUCKET_ELEMENTS,
        "stage3_param_persistence_threshold": PERSISTENT_ELEMENTS,
    }
    keeps_types = precision == config.precision and "data_types" in given
    return {"zero_optimization": zero, **({"data_types": given["data_types"]} if keeps_types else {})}


def _notes(config: RunConfig, precision: str) -> list[str]:
    model, zero = config.model, load_deepspeed(config.deepspeed).get("zero_optimization") or {}
    notes = []
    if precision != config.precision:
        notes.append(f"in {precision}, where rounding is small enough to compare; the run is in {config.precision}")
    if model.hidden_dropout or model.attention_dropout or model.ffn_dropout:
        notes.append("without dropout: layouts draw other masks on purpose")
    if any(key.startswith("offload_") for key in zero):
        notes.append("without offload: every rank is on the CPU anyway")
    if config.train.compile:
        notes.append("without torch.compile")
    if config.adapt is not None or config.task is not None:
        notes += notes_of_adaptation(config)
    return notes
