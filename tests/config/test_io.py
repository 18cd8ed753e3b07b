"""YAML, presets and overrides to a config, and back."""

import pytest
import yaml

from lmscale.config.io import documentation, load_run, parse_run, show
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError

RUN = {
    "model": {"preset": "gpt3-125m"},
    "data": {"train": [{"prefix": "a"}, {"prefix": "b", "weight": 2}], "seq_length": 128},
    "batch": {"micro_batch_size": 1, "global_batch_size": 8},
    "optim": {"lr": 1.0e-3},
    "train": {"train_tokens": 1000},
    "output_dir": "runs/x",
}


def line(*overrides, **keys) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_run({**RUN, **keys}, overrides)
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_precedence_is_defaults_then_preset_then_file_then_overrides():
    assert parse_run(RUN).model.num_layers == 12
    keys = {**RUN, "model": {"preset": "gpt3-125m", "num_layers": 3}}
    assert parse_run(keys).model.num_layers == 3
    assert parse_run(keys, ["model.num_layers=5"]).model.num_layers == 5
    assert parse_run(keys).model.hidden_size == 768
    assert parse_run(keys).model.norm_eps == 1.0e-5


def test_an_override_may_choose_the_preset():
    assert parse_run(RUN, ["model.preset=gpt3-1.3b"]).model.hidden_size == 2048


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.lr=3e-4", lambda c: c.optim.lr == 3e-4),
        ("train.train_tokens=300_000", lambda c: c.train.train_tokens == 300_000),
        ("train.train_tokens=3e11", lambda c: c.train.train_tokens == 300_000_000_000),
        ("data.train.1.prefix=c", lambda c: c.data.train[1].prefix == "c"),
        ("data.train[0].weight=4", lambda c: c.data.train[0].weight == 4),
        ("data.train=[{prefix: z}]", lambda c: [s.prefix for s in c.data.train] == ["z"]),
        ("data.split=1,0,0", lambda c: c.data.split == "1,0,0"),
        ("deepspeed=ds_configs/zero2.json", lambda c: c.deepspeed == "ds_configs/zero2.json"),
        ("deepspeed.zero_optimization.stage=3", lambda c: c.deepspeed == {"zero_optimization": {"stage": 3}}),
        ("output_dir=runs/${model.preset}", lambda c: c.output_dir == "runs/gpt3-125m"),
        ("tokenizer.path=t", lambda c: c.tokenizer.path == "t"),
    ],
)
def test_overrides_are_read(override, read):
    assert read(parse_run(RUN, [override]))


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("model.num_layer=3", "model.num_layer: unknown key; did you mean 'num_layers'?"),
        ("model.init.sdt=1", "model.init.sdt: unknown key; did you mean 'std'?"),
        ("data.train.0.weigt=1", "data.train.0.weigt: unknown key; did you mean 'weight'?"),
        ("modell.num_layers=3", "modell: unknown key; did you mean 'model'?"),
        ("model.preset=gpt3-12m", "model.preset = 'gpt3-12m': is not a preset; did you mean 'gpt3-125m'?"),
        ("model.preset=12", "model.preset = 12: input should be a valid string"),
        ("model=1", "model = 1: must be a section with keys of its own"),
        ("optim.lr=fast", "optim.lr = 'fast': input should be a valid number"),
        ("optim.lr=0", "optim.lr = 0: input should be greater than 0"),
        ("optim.lr=nan", "optim.lr = 'nan'"),
        ("batch.micro_batch_size=true", "batch.micro_batch_size = True: true and false are not values of this key"),
        ("batch.micro_batch_size=1.5", "batch.micro_batch_size = 1.5"),
        ("precision=fp8", "precision = 'fp8': input should be 'fp16', 'bf16' or 'fp32'"),
        ("output_dir=${nope}", "nope"),
        ("optim.lr=[1", "command line = 'optim.lr=[1': the value is not YAML"),
        ("data.train.7.prefix=x", "does not fit the config"),
        ("--lr", "command line = '--lr': is neither an option nor key=value"),
        ("lr", "command line = 'lr': is neither an option nor key=value"),
    ],
)
def test_wrong_overrides_are_refused_by_value(override, part):
    assert part in line(override)


def test_a_misspelt_required_key_is_reported_as_misspelt():
    assert "did you mean 'micro_batch_size'?" in line(batch={"micro_batchsize": 1, "global_batch_size": 8})


def test_a_missing_key_is_named():
    assert line(optim={}) == "optim.lr: is required and missing; add it to the config or as key=value"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: [1", "is not YAML"),
        ("a: 1\na: 2", "is not YAML"),
        ("- 1", "must hold a mapping of keys"),
        ("3", "cannot be read"),
    ],
)
def test_broken_files_are_refused(tmp_path, text, part):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        load_run(path)


def test_a_missing_file_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"config = 'nowhere.yaml': does not exist"):
        load_run("nowhere.yaml")


@pytest.mark.parametrize("overrides", [[], ["precision=fp16", "loss_scale.initial=1024", "tokenizer.path=t"]])
def test_show_is_read_back_to_the_same_config(tmp_path, overrides):
    config = parse_run(RUN, overrides)
    path = tmp_path / "config.yaml"
    path.write_text(show(config))
    assert load_run(path) == config
    assert yaml.safe_load(show(config))["model"]["num_layers"] == 12


def test_configs_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        parse_run(RUN).output_dir = "y"


def test_every_key_is_documented_in_one_line():
    rows = list(documentation())
    assert {"model.init.std", "data.train[].prefix", "batch.ramp.start"} <= {key for key, *_ in rows}
    assert [key for key, _, _, text in rows if not text or "\n" in text] == []
    assert {key.partition(".")[0] for key, *_ in rows} == set(RunConfig.model_fields)
