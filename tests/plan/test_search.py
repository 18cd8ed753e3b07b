"""The planner's search: nothing illegal, nothing legal left out, nothing that does not fit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import yaml

from lmscale.config.check import check_run
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import parse_run, show
from lmscale.config.nvidia_apex import has_apex
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError
from lmscale.plan.candidates import shapes, zero_choices
from lmscale.plan.device_types import DEVICE_TYPES
from lmscale.plan.memory import device_bytes, moment_width
from lmscale.plan.questions import (
    _between,
    base_run,
    check_devices,
    fewest_devices,
    largest_model,
    largest_preset,
    written_run,
)
from lmscale.plan.run_memory import chosen_layout
from lmscale.plan.search import CONTEXT_BYTES, fullest_stage, host_bytes, no_layout, search

A100, H100 = DEVICE_TYPES["A100-80"], DEVICE_TYPES["H100"]


def run(precision: str = "bf16", batch: int = 24, optimizer: str = "adamw", **model: Any) -> RunConfig:
    keys = {
        "model": {
            "num_layers": 6,
            "hidden_size": 64,
            "num_attention_heads": 8,
            "vocab_size": 500,
            "max_position_embeddings": 64,
            **model,
        },
        "tokenizer": {"path": "unread"},
        "data": {"train": [{"prefix": "unread"}], "seq_length": 64},
        "precision": precision,
        "batch": {"micro_batch_size": 1, "global_batch_size": batch},
        "optim": {"name": optimizer, "lr": 1.0e-3},
        "train": {"train_tokens": 1_000_000},
        "output_dir": "unwritten",
    }
    return parse_run(keys)


def is_legal(config: RunConfig, devices: int, parallel: dict[str, Any], micro: int, zero: ZeroChoice) -> bool:
    changed = config.model_copy(
        update={
            "parallel": config.parallel.model_copy(update=parallel),
            "batch": config.batch.model_copy(update={"micro_batch_size": micro}),
        }
    )
    try:
        check_run(changed, zero, devices)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("config", "devices"),
    [
        (run(), 8),
        (run("fp32", 16), 4),
        (run("fp16", 12), 6),
        (run(optimizer="adafactor"), 2),
        (run(architecture="t5", num_layers=2), 4),
    ],
    ids=["bf16", "fp32", "fp16 on 6", "adafactor", "t5"],
)
def test_shapes_and_zero_stages_are_those_that_a_brute_force_finds(config: RunConfig, devices: int) -> None:
    expected = set()
    sizes = range(1, devices + 1)
    for tp_size, pp_size, splits, stage in itertools.product(sizes, sizes, (False, True), range(4)):
        for offload, param in ((False, False), (True, False), (True, True)):
            zero = ZeroChoice(stage=stage, offload_optimizer=offload, offload_param=param)
            parallel = {"tp_size": tp_size, "pp_size": pp_size, "sequence_parallel": splits}
            dp_size = devices // (tp_size * pp_size) or 1
            for micro in (1, 2, 4, 8, 16, 32, 64, config.batch.global_batch_size // dp_size):
                if micro and micro <= 64 and is_legal(config, devices, parallel, micro, zero):
                    expected.add((tp_size, pp_size, splits, micro, stage, offload, param))
    found = set()
    for shape in shapes(config, devices, 8)[0]:
        parallel_now = shape.config.parallel
        key = (parallel_now.tp_size, parallel_now.pp_size, parallel_now.sequence_parallel)
        for choices, micro in itertools.product(zero_choices(shape), shape.micro_batch_sizes):
            found |= {(*key, micro, zero.stage, zero.offload_optimizer, zero.offload_param) for zero in choices}
    on_one = {row for row in expected if row[0] * row[1] == devices}
    assert found - on_one == expected - on_one
    # On one data-parallel rank no stage splits anything: the lowest stands for all.
    assert {row[:4] for row in found & on_one} == {row[:4] for row in on_one}
    assert {row[5:] for row in found & on_one} == {row[5:] for row in on_one}


def test_apex_is_planned_for_where_it_is_not_installed_and_never_with_what_it_refuses() -> None:
    config = base_run("gpt3-13b", A100, ["optim.implementation=apex", "train.fused_norms=apex"])
    assert not has_apex("adam")
    rows = search(config, 64, A100).rows
    assert {row.candidate.zero.stage for row in rows} == {1, 2}
    assert not any(row.candidate.zero.offload_optimizer for row in rows)
    assert written_run(config, rows[0]).optim.implementation == "apex"
    assert 3 in {row.candidate.zero.stage for row in search(base_run("gpt3-13b", A100), 64, A100).rows}


def test_rows_fit_are_sorted_and_load_as_runs() -> None:
    config = base_run("gpt3-13b", A100)
    found = search(config, 64, A100)
    assert len(found.rows) > 20
    assert [row.time.total for row in found.rows] == sorted(row.time.total for row in found.rows)
    for row in found.rows:
        assert row.memory.total <= A100.memory_bytes - CONTEXT_BYTES
        assert host_bytes(config, row.candidate) <= A100.host_memory_bytes
        written = written_run(config, row)  # checks every rule
        assert written.parallel.tp_size * written.parallel.pp_size * row.candidate.dp_size == 64
    assert parse_run(yaml.safe_load(show(written))) == written


def test_the_figures_of_a_row_agree_with_one_another() -> None:
    config = base_run("gpt3-13b", A100)
    row = search(config, 64, A100).rows[0]
    tokens = config.batch.global_batch_size * 2048
    assert row.tokens_per_second == pytest.approx(tokens / row.time.total)
    assert row.device_hours == pytest.approx(64 * config.train.train_tokens / row.tokens_per_second / 3600)
    assert row.checkpoint_bytes == pytest.approx(12 * 12.85e9, rel=0.01)
    assert 0.3 < row.mfu_fraction < A100.matmul_fraction


def test_the_recipes_own_layout_of_175b_is_among_the_rows() -> None:
    found = search(base_run("gpt3-175b", A100), 1024, A100)
    shapes_found = {(row.candidate.step.tp_size, row.candidate.step.pp_size) for row in found.rows}
    assert (8, 16) in shapes_found
    assert found.num_looked_at < 1500, "a thousand layouts take a second"


def test_offload_appears_only_where_a_stage_does_not_fit_without() -> None:
    rows = search(base_run("gpt3-6.7b", A100), 1, A100).rows
    assert rows
    assert all(row.candidate.zero.offload_optimizer for row in rows)
    assert not any(row.candidate.zero.offload_optimizer for row in search(base_run("gpt3-1.3b", A100), 32, A100).rows)


def test_no_layout_names_the_nearest_and_what_it_lacks() -> None:
    found = search(base_run("gpt3-175b", A100), 8, A100)
    assert found.rows == []
    message = str(no_layout(found, 8, A100))
    assert message.startswith("--devices = 8: no layout fits A100-80: the nearest, TP ")
    assert "GiB more than" in message


@pytest.mark.parametrize("name", ["gpt3-13b", "t5-11b", "bart-large"])
def test_the_fullest_stage_is_the_fullest_of_all(name: str) -> None:
    config = base_run(name, A100)
    for row in search(config, 16, A100).rows:
        step, zero = row.candidate.step, row.candidate.zero
        totals = [
            device_bytes(
                config.model,
                step,
                dp_size=row.candidate.dp_size,
                zero_stage=zero.stage,
                stage=stage,
                moment_width=moment_width(config.optim, config.model),
                offload_optimizer=zero.offload_optimizer,
                offload_param=zero.offload_param,
            ).total
            for stage in range(step.pp_size)
        ]
        assert row.memory.total == max(totals)


def test_offload_needs_the_hosts_memory() -> None:
    small = A100.model_copy(update={"host_memory_bytes": 10.0e9})
    found = search(base_run("gpt3-6.7b", A100), 1, small)
    assert found.rows == []
    with pytest.raises(ConfigError, match=r"no layout fits A100-80: .* GiB more than"):
        raise no_layout(found, 1, small)


def test_no_legal_layout_names_the_rule_that_failed() -> None:
    found = search(run(batch=24), 7, A100)
    with pytest.raises(
        ConfigError, match=r"TP 1 x PP 1 x DP 7, and batch\.global_batch_size = 24 must .* = 7; use 6 or 8 devices"
    ):
        raise no_layout(found, 7, A100)


def test_fewest_devices_fit_and_half_of_them_do_not() -> None:
    config = base_run("gpt3-175b", H100)
    number, found = fewest_devices(config, H100)
    assert found.rows
    assert search(config, number - 8, H100).rows == []


def test_fewest_devices_need_not_be_a_power_of_two_but_are_whole_nodes() -> None:
    device = DEVICE_TYPES["V100"]
    config = base_run("gpt3-175b", device)
    assert search(config, 32, device).rows
    assert search(config, 16, device).rows == []
    number, found = fewest_devices(config, device)
    assert number == 24
    step = found.rows[0].candidate
    assert step.step.tp_size * step.step.pp_size * step.dp_size == 24


@pytest.mark.parametrize(
    ("low", "high", "node", "numbers"),
    [
        (0, 1, 8, []),
        (2, 4, 8, [3]),
        (4, 8, 8, [5, 6, 7]),
        (4, 8, 4, []),
        (8, 16, 8, []),
        (16, 32, 8, [24]),
        (64, 128, 8, [80, 96, 112]),
    ],
)
def test_numbers_between_powers_of_two_are_nodes(low: int, high: int, node: int, numbers: list[int]) -> None:
    assert _between(low, high, node) == numbers


def test_largest_models_fit_and_the_next_do_not() -> None:
    config = base_run("gpt3-125m", A100)
    published = largest_preset(config, 1, A100)
    free = largest_model(config, 1, A100)
    assert published is not None
    assert free is not None
    model = free[0]
    assert model.hidden_size // model.num_attention_heads == 128
    wider = {"hidden_size": model.hidden_size + 1024}
    wider |= dict.fromkeys(("num_layers", "num_attention_heads"), wider["hidden_size"] // 128)
    larger = config.model_copy(update={"model": model.model_copy(update=wider)})
    assert search(larger, 1, A100).rows == []


def test_a_preset_takes_a_precision_that_the_device_has() -> None:
    assert base_run("gpt3-13b", A100).precision == "bf16"
    assert base_run("gpt3-13b", DEVICE_TYPES["V100"]).precision == "fp16"


@pytest.mark.parametrize("number", [0, -3, 10**9])
def test_absurd_numbers_of_devices_are_refused(number: int) -> None:
    with pytest.raises(ConfigError, match="must be between 1 and 1,000,000"):
        check_devices(number)


def test_the_largest_model_is_found_where_most_widths_are_not_legal() -> None:
    found = largest_model(base_run("gpt3-1.3b", H100), 48, H100)
    assert found is not None
    model, rows = found
    assert model.hidden_size > 12288  # three divides its heads or its layers, as it does not most widths'
    assert rows.rows


@pytest.mark.parametrize("override", ["data.reset_attention_mask=true", "objective.prefix_lm=true"])
def test_a_run_has_the_memory_that_its_dry_run_will_say(override: str) -> None:
    config = base_run("gpt3-1.3b", H100, ["model.num_query_groups=8", override])
    row = search(config, 8, H100).rows[0]
    written = written_run(config, row)
    zero = check_deepspeed(load_deepspeed(written.deepspeed), written)
    stage, memory = fullest_stage(written, chosen_layout(written, zero, row.candidate.dp_size, device_type="cuda"))
    assert (stage, memory) == (row.stage, row.memory)


def test_a_written_run_keeps_the_other_keys_of_its_deepspeed_json() -> None:
    keys = "deepspeed={zero_optimization: {stage: 2, reduce_bucket_size: 20000000}, comms_logger: {enabled: true}}"
    config = base_run("gpt3-1.3b", H100, [keys])
    written = load_deepspeed(written_run(config, search(config, 8, H100).rows[0]).deepspeed)
    assert written["zero_optimization"]["reduce_bucket_size"] == 20_000_000
    assert written["comms_logger"] == {"enabled": True}


def test_buckets_are_those_of_the_run() -> None:
    sizes = []
    for bucket in (20_000_000, 500_000_000):
        config = base_run(
            "gpt3-1.3b", H100, [f"deepspeed={{zero_optimization: {{stage: 2, reduce_bucket_size: {bucket}}}}}"]
        )
        zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
        sizes.append(fullest_stage(config, chosen_layout(config, zero, 8, device_type="cuda"))[1].buffers)
    assert sizes[0] == 20_000_000 * 2
    assert sizes[1] > sizes[0]
