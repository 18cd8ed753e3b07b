"""The rules between the sections of a config: each is broken once, and its message names the value."""

import pytest

from lmscale.config.check import CROSS_SECTION_RULES, check_run, dp_size_of
from lmscale.config.data import split_shares
from lmscale.config.io import parse_run
from lmscale.config.run import ZeroChoice
from lmscale.errors import ConfigError
from tests.config.broken_adaptations import BROKEN_ADAPTATIONS
from tests.config.broken_prompts import BROKEN_PROMPTS
from tests.config.broken_schedules import BROKEN_SCHEDULES
from tests.config.broken_tasks import BROKEN_TASKS
from tests.probe.test_rules import BROKEN as BROKEN_PROBES

RUN = {
    "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
    "data": {"train": [{"prefix": "a"}, {"prefix": "b"}], "seq_length": 32},
    "batch": {"micro_batch_size": 2, "global_batch_size": 16},
    "optim": {"lr": 1.0e-3},
    "train": {"train_tokens": 10_000},
    "output_dir": "runs/x",
}
RAMP = ("batch.ramp.start=4", "batch.ramp.increment=4", "batch.ramp.ramp_samples=100")

BROKEN = [
    (
        ["monitor.tensorboard=false", "monitor.histogram_interval=5"],
        1,
        "monitor.histogram_interval: goes to TensorBoard or W&B, and both are off",
        "set monitor.tensorboard or monitor.wandb",
    ),
    (
        ["monitor.tensorboard=true", "monitor.samples.prompts=[a]", "monitor.samples.max_new_tokens=4096"],
        1,
        "monitor.samples",
        "",
    ),
    (
        ["monitor.prometheus_host=0.0.0.0"],
        1,
        "monitor.prometheus_host: is read with monitor.prometheus_port only",
        "set it, or leave the host out",
    ),
    (
        ["model.hidden_size=66"],
        1,
        "model.hidden_size = 66: must be a multiple of model.num_attention_heads = 4",
        "use 64 or 68",
    ),
    (["model.position_embedding=rope", "model.head_dim=15"], 1, "model.head_dim = 15: rope rotates pairs", ""),
    (
        ["model.num_query_groups=3"],
        1,
        "model.num_attention_heads = 4: must be a multiple of model.num_query_groups = 3",
        "",
    ),
    (["parallel.tp_size=8"], 8, "model.num_attention_heads = 4: must be a multiple of parallel.tp_size = 8", "use 8"),
    (["parallel.tp_size=2", "model.num_query_groups=1"], 2, "model.num_query_groups = 1: must be a multiple of", ""),
    (["parallel.tp_size=4", "model.ffn_hidden_size=130"], 4, "model.ffn_hidden_size = 130: must be a multiple of", ""),
    (
        ["parallel.tp_size=3", "model.num_attention_heads=6", "model.hidden_size=96"],
        3,
        "parallel.tp_size = 3: must divide the padded vocabulary of 512 rows",
        "power of two",
    ),
    (
        ["parallel.tp_size=2", "parallel.sequence_parallel=true", "data.seq_length=33"],
        2,
        "data.seq_length = 33: must be a multiple of parallel.tp_size = 2",
        "use 32 or 34",
    ),
    (["optim.groups=[{name: decay, match: '*'}]"], 1, "optim.groups.0.name = 'decay': is the name of another", ""),
    (["model.init.scheme=fan_in", "model.init.std=0.01"], 1, "model.init.std = 0.01: is read with", ""),
    (["parallel.pp_size=3"], 3, "model.num_layers = 4: must be a multiple of parallel.pp_size = 3", "use 3 or 6"),
    (
        ["data.seq_length=4096"],
        1,
        "data.seq_length = 4096: must be at most model.max_position_embeddings = 2048",
        "shorten",
    ),
    ([*RAMP, "batch.ramp.start=32"], 1, "batch.ramp.start = 32: must be at most batch.global_batch_size = 16", ""),
    ([*RAMP, "batch.ramp.increment=5"], 1, "= 12: must be a multiple of batch.ramp.increment = 5", ""),
    (
        [*RAMP, "batch.ramp.start=2", "batch.ramp.increment=2"],
        2,
        "batch.ramp.start = 2: must be a multiple of",
        "use 4",
    ),
    ([*RAMP, "batch.ramp.increment=2"], 2, "batch.ramp.increment = 2: must be a multiple of", "use 4"),
    (["optim.lr_warmup_tokens=10000"], 1, "optim.lr_warmup_tokens = 10000: the warm-up must end before the decay", ""),
    (
        ["optim.name=adafactor", "optim.adam_beta2=0.9"],
        1,
        "optim.adam_beta2 = 0.9: is read with optim.name: adamw or adam or muon only",
        "",
    ),
    (["optim.adafactor_clip=2"], 1, "optim.adafactor_clip = 2.0: is read with optim.name: adafactor only", ""),
    (
        ["optim.lr_decay_style=inverse_sqrt"],
        1,
        "optim.lr_warmup_tokens = 0: optim.lr_decay_style: inverse_sqrt begins its decay there: must be above 0",
        "",
    ),
    (
        ["optim.lr_decay_style=inverse_sqrt", "optim.lr_warmup_tokens=9", "optim.lr_decay_tokens=99"],
        1,
        "optim.lr_decay_tokens = 99: optim.lr_decay_style: inverse_sqrt has no end",
        "leave it out",
    ),
    (
        ["optim.lr_warmup_style=constant"],
        1,
        "optim.lr_warmup_style = 'constant': is read with optim.lr_warmup_tokens above 0 only",
        "",
    ),
    (["optim.min_lr=1"], 1, "optim.min_lr = 1.0: must be at most optim.lr = 0.001", ""),
    (["loss_scale.initial=16"], 1, "loss_scale: scales the loss of fp16, and precision is fp32", "precision: fp16"),
    (["precision=fp16", "loss_scale.initial=3"], 1, "loss_scale.initial = 3: must be a power of two", ""),
    (["precision=fp16", "loss_scale={initial: 2, minimum: 4}"], 1, "loss_scale.minimum = 4: must be at most", ""),
    (
        ["train.compile=true", "model.attention_dropout=0.1"],
        1,
        "model.attention_dropout = 0.1: train.compile: true needs 0.0",
        "train.compile: false",
    ),
    (["model.rope_theta=5"], 1, "model.rope_theta = 5.0: is read with model.position_embedding: rope only", ""),
    (
        ["model.position_embedding=rope", "model.init.position_std=1"],
        1,
        "model.init.position_std = 1.0: is read with",
        "",
    ),
    (["data.train.1.prefix=a"], 1, "data.train.prefix = 'a': is given twice", ""),
    (["data.valid=[{name: v, prefix: x}, {name: v, prefix: y}]"], 1, "data.valid.name = 'v': is given twice", ""),
    (["data.split='1,2'"], 1, "data.split = '1,2': must be three numbers", "98,1,1"),
    (["data.split='0,1,1'"], 1, "data.split = '0,1,1': must be three numbers", ""),
    (["data.split='nan,1,1'"], 1, "data.split = 'nan,1,1': must be three numbers", ""),
    (
        ["parallel.tp_size=2", "parallel.pp_size=2"],
        6,
        "ranks = 6: must be a multiple of parallel.tp_size x",
        "start 4 ranks",
    ),
    (
        ["parallel.tp_size=2"],
        1,
        "ranks = 1: must be a multiple of parallel.tp_size x parallel.pp_size = 2 x 1",
        "start 2 ranks",
    ),
    (
        [],
        3,
        "batch.global_batch_size = 16: must be a multiple of batch.micro_batch_size x dp_size = 2 x 3 = 6",
        "use 12 or 18",
    ),
    (
        ["optim.name=sgd", "optim.sgd_nesterov=true"],
        1,
        "sgd_nesterov = True: is read with optim.sgd_momentum above 0",
        "",
    ),
    (["optim.lion_beta2=0.9"], 1, "optim.lion_beta2 = 0.9: is read with optim.name: lion only", ""),
    (
        ["optim.name=lion", "optim.implementation=deepspeed"],
        1,
        "optim.implementation = 'deepspeed': moves values",
        "auto",
    ),
    (["optim.implementation=apex"], 1, "optim.implementation = 'apex': is not installed", "use auto, or torch"),
    (["train.fused_norms=apex"], 1, "train.fused_norms = 'apex': is not installed", "use auto, or torch"),
    (["parallel.pp_size=2"], 2, "pipeline with ZeRO 2 or 3", "use ZeRO 1"),
    (["objective.name=bart"], 1, "objective.name = 'bart': model.architecture: gpt is trained by causal_lm", ""),
    (["data.decoder_seq_length=8"], 1, "data.decoder_seq_length = 8: is read by bart and t5 only", "leave it out"),
    (["model.preset=bert-base"], 1, "tokenizer: is required by objective bert, for its special ids", "add the section"),
    (["model.token_types=2"], 1, "model.token_types = 2: is read by bert and roberta only", ""),
    (
        ["model.preset=t5-small", "tokenizer.path=x", "model.relative_max_distance=16"],
        1,
        "model.relative_max_distance = 16: must be above half of model.relative_buckets = 32: 16",
        "",
    ),
    (["model.position_embedding=relative"], 1, "model.position_embedding = 'relative': t5 is built with relative", ""),
    (
        ["model.preset=t5-small", "tokenizer.path=x", "objective.noise=iid", "objective.mean_span=4"],
        1,
        "objective.mean_span = 4.0: is read with objective.noise: spans only",
        "",
    ),
    (
        ["model.preset=t5-small", "tokenizer.path=x", "data.seq_length=2048"],
        1,
        "data.seq_length: makes 114 spans of 2274 tokens, and there are 100 sentinels",
        "shorten the sequence",
    ),
    (
        ["model.preset=bart-base", "tokenizer.path=x", "data.decoder_seq_length=2048"],
        1,
        "data.decoder_seq_length = 2048: must be at most model.max_position_embeddings = 1024",
        "",
    ),
    (
        ["model.preset=bart-base", "tokenizer.path=x", "data.decoder_seq_length=2"],
        1,
        "data.decoder_seq_length = 2: must hold one token and two special tokens: at least 3",
        "",
    ),
    *(
        (["model.preset=bart-base", "tokenizer.path=x", *overrides], 1, rule, "")
        for overrides, rule in (
            (
                ["objective.masked_share=0", "objective.replacement=each"],
                "objective.replacement = 'each': is read with objective.masked_share above 0 only",
            ),
            (
                ["objective.masking=tokens", "objective.replacement=none", "objective.random_share=0.5"],
                "objective.random_share = 0.5: is read with masks to replace",
            ),
            (
                ["objective.preset=bart_paper", "objective.masking=tokens"],
                "objective.preset = 'bart_paper': is read with objective.masking: spans",
            ),
            (
                ["objective.preset=bart_released", "objective.masked_share=0"],
                "objective.preset = 'bart_released': is read with objective.masking: spans and objective.masked_share",
            ),
        )
    ),
    (
        ["faults.overflow_storm.overflows=3"],
        1,
        "counts the overflows of fp16, and precision is fp32",
        "drop the section",
    ),
    (["faults.loss_spike={window: 8, min_steps: 9}"], 1, "faults.loss_spike.min_steps = 9: must be at most", ""),
    (
        ["faults.non_finite.action=rewind", "checkpoint.save_interval=0"],
        1,
        "faults.non_finite.action = 'rewind': goes back to a checkpoint, and checkpoint.save_interval = 0 saves none",
        "use skip or stop",
    ),
    *((overrides, 1, rule, "") for overrides, rule in BROKEN_PROMPTS),
    *((overrides, 2 if "parallel.tp_size=2" in overrides else 1, rule, "") for overrides, rule in BROKEN_SCHEDULES),
    *((overrides, 1, rule, "") for overrides, rule in BROKEN_TASKS),
    *((overrides, 1, rule, "") for overrides, rule in BROKEN_ADAPTATIONS),
]


@pytest.mark.parametrize(("overrides", "ranks", "rule", "remedy"), BROKEN, ids=lambda value: str(value)[:40])
def test_broken_rules_name_field_value_and_remedy(overrides, ranks, rule, remedy):
    config = parse_run(RUN, overrides)
    zero = ZeroChoice(stage=2 if rule.startswith("pipeline") else 1)
    with pytest.raises(ConfigError) as caught:
        check_run(config, zero, ranks)
    assert rule in str(caught.value)
    assert remedy in str(caught.value)


def test_every_rule_between_sections_is_broken_above():
    broken = set()
    configs = [parse_run(RUN, overrides) for overrides, _, _, _ in BROKEN]
    for config in [*configs, *(parse_run(keys) for keys, _ in BROKEN_PROBES)]:
        for rule in CROSS_SECTION_RULES:
            try:
                rule(config)
            except ConfigError:
                broken.add(rule)
    assert broken == set(CROSS_SECTION_RULES)


@pytest.mark.parametrize(
    ("overrides", "ranks", "dp_size"),
    [([], 1, 1), ([], 8, 8), (["parallel.tp_size=2", "parallel.pp_size=2"], 8, 2), ([*RAMP], 2, 2)],
)
def test_sound_runs_pass_and_dp_size_is_what_remains(overrides, ranks, dp_size):
    config = parse_run(RUN, overrides)
    check_run(config, ZeroChoice(stage=1), ranks)
    assert dp_size_of(config, ranks) == dp_size


def test_split_shares_are_fractions():
    assert split_shares("98,1,1") == (0.98, 0.01, 0.01)
    assert split_shares("1,0,0") == (1.0, 0.0, 0.0)
