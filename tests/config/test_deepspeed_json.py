"""The policy on DeepSpeed's JSON keys."""

import json
import math
from pathlib import Path

import pytest

from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed, passed_notes, resolve_deepspeed
from lmscale.config.deepspeed_keys import KEYS
from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig, ZeroChoice
from lmscale.errors import ConfigError

DS_CONFIGS = Path(__file__).parents[2] / "ds_configs"
RUN = {
    "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    "data": {"train": [{"prefix": "corpus"}], "seq_length": 32},
    "batch": {"micro_batch_size": 2, "global_batch_size": 16},
    "optim": {"lr": 1.0e-3, "max_grad_norm": 0.7},
    "train": {"train_tokens": 10_000},
    "output_dir": "runs/x",
}
FP16 = {"precision": "fp16", "loss_scale": {"initial": 4096, "window": 500, "hysteresis": 3, "minimum": 2}}


def run_config(**keys) -> RunConfig:
    return parse_run({**RUN, **keys})


def nested(path: str, value):
    for part in reversed(path.split(".")):
        value = {part: value}
    return value


def message(keys, **config) -> str:
    with pytest.raises(ConfigError) as caught:
        check_deepspeed(keys, run_config(**config))
    assert caught.value.exit_status == 2
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(DS_CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_files_hold_tested_keys_that_deepspeed_owns(path):
    keys = load_deepspeed(str(path))
    assert check_deepspeed(keys, run_config()).stage == int(path.stem[4])
    assert passed_notes(keys) == []
    assert set(keys) <= {"zero_optimization", "data_types"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero0", ZeroChoice(stage=0)),
        ("zero3", ZeroChoice(stage=3)),
        ("zero2_offload", ZeroChoice(stage=2, offload_optimizer=True)),
        ("zero3_offload", ZeroChoice(stage=3, offload_optimizer=True, offload_param=True)),
    ],
)
def test_zero_choice_is_read_from_the_file(name, expected):
    assert check_deepspeed(load_deepspeed(str(DS_CONFIGS / f"{name}.json")), run_config()) == expected


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "is not JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage: is given twice"),
        ("\udcff", "cannot be read"),
    ],
)
def test_broken_files_are_refused(tmp_path, content, part):
    path = tmp_path / "ds.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=part):
        load_deepspeed(str(path))


def test_missing_file_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"deepspeed = 'nowhere.json': does not exist"):
        load_deepspeed("nowhere.json")


def test_inline_keys_are_copied():
    keys = {"zero_optimization": {"stage": 1}}
    load_deepspeed(keys)["zero_optimization"]["stage"] = 3
    assert keys["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(
    ("keys", "nearest"),
    [
        ({"zero_optimisation": {}}, "zero_optimization"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_comm"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "device"),
        ({"fp16": {"loss_scale_windows": 1}}, "loss_scale_window"),
        ({"flops_profiler": {"profile_steps": 5}}, "profile_step"),
    ],
)
def test_misspelt_keys_name_the_nearest(keys, nearest):
    line = message(keys)
    assert "unknown key" in line
    assert f"did you mean {nearest!r}?" in line


@pytest.mark.parametrize("path", [path for path, key in KEYS.items() if key.status == "refused"])
def test_refused_keys_say_why_and_what_to_do(path):
    line = message(nested(path, True))
    assert f"deepspeed.{path}: is refused: {KEYS[path].note}; {KEYS[path].remedy}" in line


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage = 4: must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, "stage = True: must be an integer"),
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, "reduce_bucket_size = 'auto': must be an integer"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device = 'nvme': must be one of cpu, none"),
        ({"zero_optimization": True}, "zero_optimization = True: must be an object"),
        ({"zero_allow_untested_optimizer": False}, "zero_allow_untested_optimizer = False: must be one of True"),
        ({"fp16": {"loss_scale": 128}}, "deepspeed.fp16.loss_scale = 128: is a static loss scale"),
    ],
)
def test_wrong_values_are_named(keys, part):
    assert part in message(keys)


def test_integers_may_be_written_with_an_exponent():
    check_deepspeed({"zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8}}, run_config())


AGREEMENTS = [
    ("train_batch_size", 16, 8, "batch.global_batch_size = 16", {}),
    ("train_micro_batch_size_per_gpu", 2, 1, "batch.micro_batch_size = 2", {}),
    ("gradient_clipping", 0.7, 1.0, "optim.max_grad_norm = 0.7", {}),
    ("fp16.enabled", False, True, "precision = fp32, fp16 = False", {}),
    ("bf16.enabled", True, False, "precision = bf16, bf16 = True", {"precision": "bf16"}),
    ("fp16.initial_scale_power", 12, 16, "log2(loss_scale.initial) = 12", FP16),
    ("fp16.loss_scale_window", 500, 1000, "loss_scale.window = 500", FP16),
    ("fp16.hysteresis", 3, 2, "loss_scale.hysteresis = 3", FP16),
    ("fp16.min_loss_scale", 2, 1, "loss_scale.minimum = 2", FP16),
]


@pytest.mark.parametrize(("path", "agreeing", "other", "ours", "config"), AGREEMENTS)
def test_keys_given_in_two_places_must_agree(path, agreeing, other, ours, config):
    check_deepspeed(nested(path, agreeing), run_config(**config))
    check_deepspeed(nested(path, "auto"), run_config(**config))
    line = message(nested(path, other), **config)
    assert f"deepspeed.{path} = {other!r}: contradicts {ours}" in line


def test_accumulation_steps_must_agree_with_the_ranks():
    keys = {"gradient_accumulation_steps": 4}
    assert resolve_deepspeed(keys, run_config(), dp_size=2)["gradient_accumulation_steps"] == 4
    with pytest.raises(ConfigError, match=r"deepspeed.gradient_accumulation_steps = 4: contradicts .* = 8"):
        resolve_deepspeed(keys, run_config(), dp_size=1)


def test_resolved_json_holds_the_runs_batch_and_clipping():
    keys = {"zero_optimization": {"stage": 1}, "train_batch_size": "auto", "gradient_clipping": "auto"}
    resolved = resolve_deepspeed(keys, run_config(), dp_size=2)
    assert resolved == {
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 1},
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.7,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }


@pytest.mark.parametrize("keys", [{}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_never_clips_under_zero_0(keys):
    assert resolve_deepspeed(keys, run_config(), dp_size=1)["gradient_clipping"] == 0.0


def test_resolved_json_holds_the_loss_scale():
    resolved = resolve_deepspeed({"fp16": {"consecutive_hysteresis": True}}, run_config(**FP16), dp_size=1)
    assert resolved["fp16"] == {
        "consecutive_hysteresis": True,
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": math.log2(4096),
        "loss_scale_window": 500,
        "hysteresis": 3,
        "min_loss_scale": 2,
    }
    assert "bf16" not in resolved


def test_resolved_json_holds_bf16_and_the_users_data_types():
    keys = {"data_types": {"grad_accum_dtype": "fp32"}, "fp16": {"enabled": False}}
    resolved = resolve_deepspeed(keys, run_config(precision="bf16"), dp_size=1)
    assert resolved["bf16"] == {"enabled": True}
    assert resolved["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in resolved


def test_passed_keys_come_with_a_note():
    keys = {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 3, "stage3_allgather_sequential": True},
        "flops_profiler": {"enabled": True},
    }
    names = [note.partition(":")[0] for note in passed_notes(keys)]
    assert names == ["wall_clock_breakdown", "flops_profiler", "zero_optimization.stage3_allgather_sequential"]


def test_resolved_json_is_json():
    keys = load_deepspeed(str(DS_CONFIGS / "zero3_offload.json"))
    resolved = resolve_deepspeed(keys, run_config(), dp_size=1)
    assert json.loads(json.dumps(resolved)) == resolved
