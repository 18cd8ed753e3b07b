"""Every file in launch/runs that pretrains: it loads, fits its devices, and says what the paper says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from lmscale.config.check import check_run, dp_size_of
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run
from lmscale.config.run import RunConfig
from lmscale.optim.lr import lr_at
from lmscale.plan.params import num_parameters

ROOT = Path(__file__).resolve().parent.parent
RUNS = sorted(path for path in (ROOT / "launch" / "runs").glob("*.yaml") if not path.stem.startswith("adapt-"))
"""Those that adapt are of tests/test_adaptation_recipes.py."""
SEQ_LENGTH = 2048


class Size(NamedTuple):
    """A row of Brown et al. 2020, table 2.1, and what appendix B says of its batch ramp."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    global_batch_size: int
    lr: float
    modern_std: float
    ramp_tokens: float


SIZES = {
    "125m": Size(12, 768, 12, 256, 6.0e-4, 0.020, 4e9),
    "350m": Size(24, 1024, 16, 256, 3.0e-4, 0.018, 4e9),
    "760m": Size(24, 1536, 16, 256, 2.5e-4, 0.015, 4e9),
    "1.3b": Size(24, 2048, 16, 512, 2.0e-4, 0.013, 4e9),
    "2.7b": Size(32, 2560, 32, 512, 1.6e-4, 0.011, 6e9),
    "6.7b": Size(32, 4096, 32, 1024, 1.2e-4, 0.009, 10e9),
    "13b": Size(40, 5120, 40, 1024, 1.0e-4, 0.008, 11e9),
    "175b": Size(96, 12288, 96, 1536, 0.6e-4, 0.005, 12e9),
}
OTHER_RUNS = {
    *(f"bert-{size}-{length}" for size in ("base", "large") for length in (128, 512)),
    *(f"{family}-{size}" for family in ("roberta", "bart") for size in ("base", "large")),
}
T5_RUNS = [
    *(f"t5-{size}" for size in ("small", "base", "large", "3b", "11b")),
    *(f"t5-v1.1-{size}" for size in ("small", "base", "large", "xl", "xxl")),
]
GPT3_RUNS = [(name, variant) for name in SIZES for variant in ("paper", "modern")]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def load_gpt3(name: str, variant: str) -> RunConfig:
    return load_run(ROOT / "launch" / "runs" / f"gpt3-{name}-{variant}.yaml")


def header(path: Path) -> str:
    return "\n".join(line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#"))


def num_devices(path: Path) -> int:
    found = re.search(r"^# devices: (\d+)$", path.read_text(), re.MULTILINE)
    assert found, f"{path.name} does not say '# devices: N'"
    return int(found[1])


def test_each_model_has_its_runs_and_nothing_else_is_there() -> None:
    assert {path.stem for path in RUNS} == {f"gpt3-{n}-{v}" for n, v in GPT3_RUNS} | OTHER_RUNS | {
        *T5_RUNS,
        "quickstart",
    }


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_is_legal_on_the_devices_that_it_names(path: Path) -> None:
    config = load_run(path)
    zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
    check_run(config, zero, num_devices(path))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_states_its_command(path: Path) -> None:
    assert f"launch/runs/{path.name}" in header(path)


@pytest.mark.parametrize(("name", "variant"), GPT3_RUNS)
def test_gpt3_run_has_the_numbers_of_the_table(name: str, variant: str) -> None:
    config, size = load_gpt3(name, variant), SIZES[name]
    model = config.model
    assert (model.num_layers, model.hidden_size, model.num_attention_heads) == size[:3]
    assert (model.vocab_size, model.max_position_embeddings, model.ffn_size) == (
        50257,
        SEQ_LENGTH,
        4 * size.hidden_size,
    )
    assert config.data.seq_length == SEQ_LENGTH
    assert config.batch.global_batch_size == size.global_batch_size
    optim = config.optim
    assert optim.lr == pytest.approx(size.lr)
    assert (optim.name, optim.lr_decay_style) == ("adamw", "cosine")
    assert (optim.adam_beta1, optim.adam_beta2, optim.adam_eps) == (0.9, 0.95, 1e-8)
    assert (optim.weight_decay, optim.max_grad_norm) == (0.1, 1.0)
    assert config.train.train_tokens == 300_000_000_000


@pytest.mark.parametrize("name", SIZES)
def test_paper_variant_trains_as_the_paper_did(name: str) -> None:
    config, size = load_gpt3(name, "paper"), SIZES[name]
    scale, ramp, optim = config.loss_scale, config.batch.ramp, config.optim
    assert config.precision == "fp16"
    assert scale is not None
    assert (scale.initial, scale.window, scale.hysteresis) == (2**11, 500, 2)
    assert config.model.init.std == 0.02
    assert (optim.lr_warmup_tokens, optim.lr_decay_tokens) == (375_000_000, 260_000_000_000)
    assert optim.min_lr == pytest.approx(size.lr / 10)
    assert ramp is not None
    assert (ramp.start, ramp.increment) == (16, 16)
    assert ramp.ramp_samples == int(size.ramp_tokens / SEQ_LENGTH)


@pytest.mark.parametrize("name", SIZES)
def test_modern_variant_uses_bf16_and_a_full_decay(name: str) -> None:
    config, size = load_gpt3(name, "modern"), SIZES[name]
    assert config.precision == "bf16"
    assert config.batch.ramp is None
    assert config.model.init.std == size.modern_std
    assert config.model.init.std == pytest.approx((3 * size.hidden_size) ** -0.5, abs=1.0e-3)
    assert config.optim.min_lr == 1e-6
    assert (config.optim.lr_warmup_tokens, config.optim.lr_decay_tokens) == (3_000_000_000, 300_000_000_000)


@pytest.mark.parametrize(("name", "first_full_step"), [("125m", 716), ("1.3b", 358), ("6.7b", 179)])
def test_papers_warmup_without_a_ramp_ends_at_known_steps(name: str, first_full_step: int) -> None:
    """375M tokens are 715.3, 357.6 and 178.8 steps of 256, 512 and 1,024 sequences."""
    config = load_gpt3(name, "paper")
    tokens = config.batch.global_batch_size * SEQ_LENGTH
    before, after = (
        lr_at(step * tokens, config.optim, config.train.train_tokens) for step in (first_full_step - 1, first_full_step)
    )
    assert before < 0.9999 * config.optim.lr
    assert after == pytest.approx(config.optim.lr, rel=1e-5)


@pytest.mark.parametrize("name", SIZES)
def test_variants_use_tensor_parallelism_within_a_host_of_eight(name: str) -> None:
    for variant in ("paper", "modern"):
        config = load_gpt3(name, variant)
        assert 8 % config.parallel.tp_size == 0
        assert config.parallel.sequence_parallel == (config.parallel.tp_size > 1)


class Adam(NamedTuple):
    """Constants of an optimizer, as a paper or its code has them."""

    lr: float
    beta2: float
    eps: float
    clip: float
    warmup_steps: int
    steps: int
    batch: int


@pytest.mark.parametrize(
    ("name", "length", "adam"),
    [
        ("bert-base-128", 128, Adam(1e-4, 0.999, 1e-6, 1.0, 10_000, 1_000_000, 256)),
        ("bert-large-128", 128, Adam(1e-4, 0.999, 1e-6, 1.0, 10_000, 1_000_000, 256)),
        ("bert-base-512", 512, Adam(1e-5, 0.999, 1e-6, 1.0, 0, 100_000, 256)),
        ("bert-large-512", 512, Adam(1e-5, 0.999, 1e-6, 1.0, 0, 100_000, 256)),
        ("roberta-base", 512, Adam(6e-4, 0.98, 1e-6, 0.0, 24_000, 500_000, 8192)),
        ("roberta-large", 512, Adam(4e-4, 0.98, 1e-6, 0.0, 30_000, 500_000, 8192)),
        ("bart-base", 512, Adam(4e-4, 0.999, 1e-8, 0.1, 10_000, 500_000, 8000)),
        ("bart-large", 512, Adam(4e-4, 0.999, 1e-8, 0.1, 10_000, 500_000, 8000)),
    ],
)
def test_other_runs_have_the_numbers_of_their_papers(name: str, length: int, adam: Adam) -> None:
    config = load_run(ROOT / "launch" / "runs" / f"{name}.yaml")
    optim, tokens = config.optim, config.batch.global_batch_size * config.lengths.nominal
    assert (config.data.seq_length, config.batch.global_batch_size) == (length, adam.batch)
    assert (optim.lr, optim.adam_beta1, optim.adam_beta2, optim.adam_eps) == (adam.lr, 0.9, adam.beta2, adam.eps)
    assert (optim.weight_decay, optim.max_grad_norm, optim.lr_decay_style) == (0.01, adam.clip, "linear")
    assert optim.lr_warmup_tokens == adam.warmup_steps * tokens
    assert optim.lr_decay_tokens == adam.steps * tokens
    assert (optim.adam_bias_correction, optim.adam_eps_mode) == (
        (False, "corrected") if name.startswith("bert") else (True, "raw")
    )
    # BERT's code excludes biases and norms by name; fairseq, of RoBERTa and BART, has one group of all parameters.
    assert optim.decay_biases_and_norms == (not name.startswith("bert"))
    assert (config.model.hidden_dropout, config.model.attention_dropout) == (0.1, 0.1)


OBJECTIVES = {
    "bert": {"masked_share": 0.15, "short_share": 0.1, "static_copies": 10, "whole_words": False},
    "roberta": {"masked_share": 0.15, "kept_share": 0.1, "random_share": 0.1, "packing": "full_sentences"},
    "bart": {
        "preset": "bart_released",
        "masking": "spans",
        "masked_share": 0.3,
        "replacement": "one",
        "permuted_share": 1.0,
        "rotated_share": 0.0,
        "inserted_share": 0.0,
    },
    "t5": {"noise": "spans", "density": 0.15, "mean_span": 3.0, "z_loss": 1e-4},
}


@pytest.mark.parametrize("name", [*sorted(OTHER_RUNS), *T5_RUNS])
def test_other_runs_noise_as_their_papers_did(name: str) -> None:
    objective = load_run(ROOT / "launch" / "runs" / f"{name}.yaml").objective
    assert objective.model_dump(include=OBJECTIVES[objective.name].keys()) == OBJECTIVES[objective.name]
    assert objective.name == name.split("-")[0]
    if objective.name == "bert":
        assert objective.max_predictions == (20 if name.endswith("128") else 77)


@pytest.mark.parametrize("name", T5_RUNS)
def test_t5_run_has_the_numbers_of_its_paper(name: str) -> None:
    """The baseline of 2^19 steps of 128 sequences, and the other sizes, a million steps of 2^11."""
    config = load_run(ROOT / "launch" / "runs" / f"{name}.yaml")
    optim, nominal, model = config.optim, config.lengths.nominal, config.model
    batch, steps = (128, 2**19) if name == "t5-base" else (2**11, 10**6)
    assert (config.lengths.raw, config.lengths.encoder, config.lengths.decoder) == (568, 512, 114)
    assert config.batch.global_batch_size == batch
    assert config.train.train_tokens == steps * batch * nominal
    assert (optim.name, optim.weight_decay, optim.max_grad_norm) == ("adafactor", 0.0, 0.0)
    assert (optim.adafactor_decay_exponent, optim.adafactor_eps1, optim.adafactor_eps2) == (0.8, 1e-30, 1e-3)
    assert (optim.adafactor_clip, optim.adafactor_scale_parameter, optim.adafactor_min_dim) == (1.0, True, 128)
    for step in (1, 5_000, 10_000, 40_000, steps):
        rate = lr_at(step * batch * nominal, optim, config.train.train_tokens)
        assert rate == pytest.approx(max(step, 10_000) ** -0.5, rel=1.0e-12)
    dropout = 0.0 if "v1.1" in name else 0.1
    assert (model.hidden_dropout, model.attention_dropout, model.ffn_dropout) == (dropout,) * 3
    assert config.precision == "bf16"


@pytest.mark.parametrize("size", ["base", "large"])
def test_berts_two_phases_make_one_schedule(size: str) -> None:
    first, second = (load_run(ROOT / "launch" / "runs" / f"bert-{size}-{length}.yaml") for length in (128, 512))
    step = first.batch.global_batch_size * first.lengths.nominal
    assert first.train.stop_at_step is not None
    last = lr_at(first.train.stop_at_step * step, first.optim, first.train.train_tokens)
    begins = lr_at(1, second.optim, second.train.train_tokens)
    assert begins == pytest.approx(last, rel=0.02)
    assert second.model.init_from == first.output_dir


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_bytes_of_state_in_the_header_follow_the_formula(path: Path) -> None:
    """Weights and gradients in half precision (fp32 gradients with bf16), the optimizer's bytes over the ranks.

    These are 12: master weights and Adam's two moments; Adafactor's statistics are of matrices' rows and columns only.
    """
    found = re.search(r"a device holds ([\d.]+) GB of weights", header(path))
    if path.stem == "quickstart":
        assert not found
        return
    assert found
    config, devices = load_run(path), num_devices(path)
    model, parallel = config.model, config.parallel
    optimizer = {"adamw": 12, "adafactor": 4}[config.optim.name]
    per_parameter = (4 if config.precision == "fp16" else 6) + optimizer / dp_size_of(config, devices)
    expected = num_parameters(model) / (parallel.tp_size * parallel.pp_size) * per_parameter / 1e9
    assert float(found[1]) == pytest.approx(expected, rel=0.01, abs=0.06)
