"""The shrunk copy makes the run's choices, keeps its ratios, and fits the layouts that the run fits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmscale.config.io import load_run, parse_run
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError
from lmscale.optim.lr import lr_at
from lmscale.verify.layouts import Candidate, all_layouts
from lmscale.verify.shrink import fits, lay_out, shrink

ROOT = Path(__file__).resolve().parents[2]
ALL_RUNS = sorted((ROOT / "launch" / "runs").glob("*.yaml"))
RUNS = [path for path in ALL_RUNS if not path.name.startswith("adapt-")]
"""What pretrains; an adaptation is of its base's size."""
STEPS = 5
KEPT = (
    "architecture",
    "position_embedding",
    "rope_theta",
    "normalization",
    "norm_eps",
    "activation",
    "linear_bias",
    "tied_head",
    "init",
)


def keys_of(**model: Any) -> dict[str, Any]:
    base = {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "vocab_size": 50257}
    return {
        "model": {**base, **model},
        "data": {"train": [{"prefix": "nowhere/corpus"}], "seq_length": 1024},
        "batch": {"micro_batch_size": 4, "global_batch_size": 512},
        "optim": {"lr": 1.0e-3},
        "train": {"train_tokens": 10**9},
        "output_dir": "nowhere/run",
    }


def shrunk(config: RunConfig, max_ranks: int = 4, precision: str = "fp32") -> RunConfig:
    layouts = all_layouts(max_ranks, precision, config.parallel.recompute)
    return shrink(config, layouts, STEPS, precision)[0]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_copy_of_every_recipe_fits_every_layout(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(path)
    small = shrunk(config)
    layouts = all_layouts(4, "fp32", config.parallel.recompute)
    assert len(layouts) > 40
    if config.model.architecture == "t5":  # 114 targets do not divide over four ranks, 6 heads neither
        layouts = [layout for layout in layouts if _divides(config, layout)]
    assert len(layouts) > 30
    for layout in layouts:
        placed = lay_out(small, layout)
        assert (placed.parallel.tp_size, placed.parallel.pp_size) == (layout.tp_size, layout.pp_size)
        assert placed.deepspeed["zero_optimization"]["stage"] == layout.zero_stage  # type: ignore[index]


def _divides(config: RunConfig, layout: Candidate) -> bool:
    return config.model.num_attention_heads % layout.tp_size == 0 and not (
        layout.sequence_parallel and config.lengths.decoder % layout.tp_size
    )


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_copy_of_every_recipe_is_small_and_makes_its_choices(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_run(path)
    small = shrunk(config)
    width = {"t5-11b": 32, "t5-v1.1-small": 85}.get(path.stem, 64)  # whose heads are wider or narrower than they are
    assert (small.model.hidden_size, small.data.seq_length) == (width, 32)
    assert small.model.num_layers == (2 if path.stem in ("bart-base", "t5-small") else 4)  # in each of two stacks
    assert small.model.ffn_size == pytest.approx(width * config.model.ffn_size / config.model.hidden_size, rel=0.02)
    assert {key: getattr(small.model, key) for key in KEPT} == {key: getattr(config.model, key) for key in KEPT}
    assert (small.optim.name, small.optim.lr) == (config.optim.name, config.optim.lr)
    shortened = {"max_predictions"}
    assert small.objective.model_dump(exclude=shortened) == config.objective.model_dump(exclude=shortened)
    assert small.parallel.recompute == config.parallel.recompute
    assert (small.batch.ramp is None) == (config.batch.ramp is None)
    assert (small.model.vocab_size % 128 == 0) == (config.model.vocab_size % 128 == 0)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_copy_trains_at_rates_of_the_runs_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warm-up is shortened with the run: five steps of the run itself would leave the weights as they are."""
    monkeypatch.chdir(ROOT)
    small = shrunk(load_run(path))
    tokens = small.batch.global_batch_size * small.lengths.nominal
    rates = [lr_at(step * tokens, small.optim, small.train.train_tokens) for step in range(1, STEPS + 1)]
    assert max(rates) > 0.5 * small.optim.lr


@pytest.mark.parametrize(
    "schedule",
    [
        {"lr_decay_style": "wsd", "lr_cooldown_tokens": 10**7, "lr_cooldown_style": "cosine"},
        {"lr_decay_style": "inverse_sqrt", "lr_cooldown": {"start_tokens": 9 * 10**7, "tokens": 10**7}},
        {"lr_decay_style": "constant", "lr_cooldown": {"start_tokens": 61 * 10**6, "tokens": 39 * 10**6}},
        {"lr_rewarmup": {"start_tokens": 5 * 10**7, "tokens": 10**7}},
        {"weight_decay_style": "linear", "weight_decay_end": 0.3},
    ],
    ids=str,
)
def test_copy_keeps_the_parts_of_a_schedule_on_every_layout(schedule: dict[str, Any]) -> None:
    keys = keys_of()
    keys["optim"] = {"lr": 1.0e-3, "lr_warmup_tokens": 10**6, **schedule}
    keys["train"]["train_tokens"] = 10**8
    keys["data"]["seq_length_stages"] = [{"seq_length": 256, "until_tokens": 10**6}]
    keys["batch"]["stages"] = [{"batch_size": 8, "until_tokens": 10**6}]
    small = shrunk(parse_run(keys))
    assert all(getattr(small.optim, key) is not None for key in schedule)
    assert (small.data.seq_length_stages[0].seq_length, small.batch.ramp is not None) == (16, True)
    for layout in all_layouts(4, "fp32", "none"):
        lay_out(small, layout)


def test_ratios_of_a_llama_are_kept() -> None:
    config = parse_run(
        keys_of(
            hidden_size=4096,
            num_attention_heads=32,
            num_query_groups=8,
            ffn_hidden_size=14336,
            activation="swiglu",
            position_embedding="rope",
            rope_theta=5.0e5,
        )
    )
    model = shrunk(config).model
    assert (model.num_attention_heads, model.query_groups) == (16, 4)
    assert model.ffn_size / model.hidden_size == 14336 / 4096
    assert model.rope_theta == 5.0e5


def test_what_a_run_does_not_fit_its_copy_does_not_fit_either() -> None:
    """25 heads divide over no two ranks, 6 layers over no four stages: GPT-2 XL's heads are an example."""
    config = parse_run(keys_of(num_layers=6, hidden_size=1600, num_attention_heads=25))
    layouts = all_layouts(4, "fp32", "none")
    small = shrunk(config)
    assert {layout.tp_size for layout in layouts if fits(small, layout)} == {1}
    assert {layout.pp_size for layout in layouts if fits(small, layout)} == {1, 2}


def test_dropout_offload_and_precision_are_left_out_and_said() -> None:
    keys = keys_of(hidden_dropout=0.1)
    keys |= {
        "precision": "bf16",
        "deepspeed": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    }
    small, notes = shrink(parse_run(keys), all_layouts(2, "fp32", "none"), STEPS, "fp32")
    assert small.model.hidden_dropout == 0
    assert "offload_optimizer" not in small.deepspeed["zero_optimization"]  # type: ignore[index]
    said = "\n".join(notes)
    assert "dropout" in said
    assert "offload" in said
    assert "the run is in bf16" in said


@settings(max_examples=60, deadline=None)
@given(
    groups=st.integers(1, 96),
    ratio=st.integers(1, 8),
    head_dim=st.integers(1, 64).map(lambda half: 2 * half),
    layers=st.integers(1, 100),
    ffn_size=st.integers(1, 4096),
    seq_length=st.integers(1, 2048),
    vocab_size=st.integers(1, 100_000),
    max_ranks=st.integers(1, 8),
)
def test_copy_fits_what_divides_for_the_run(
    groups: int,
    ratio: int,
    head_dim: int,
    layers: int,
    ffn_size: int,
    seq_length: int,
    vocab_size: int,
    max_ranks: int,
) -> None:
    heads = groups * ratio
    keys = keys_of(
        num_layers=layers,
        hidden_size=heads * head_dim,
        num_attention_heads=heads,
        num_query_groups=groups,
        ffn_hidden_size=ffn_size,
        vocab_size=vocab_size,
    )
    keys["data"]["seq_length"] = seq_length
    config = parse_run(keys)
    small = shrunk(config, max_ranks)
    assert small.model.num_attention_heads // small.model.query_groups == ratio
    assert small.model.num_layers <= max(layers, 2)
    for layout in all_layouts(max_ranks, "fp32", "none"):
        divides = math.gcd(groups, layout.tp_size) == math.gcd(ffn_size, layout.tp_size) == layout.tp_size
        divides &= layers % layout.pp_size == 0
        divides &= not layout.sequence_parallel or seq_length % layout.tp_size == 0
        assert fits(small, layout) == divides, layout.name


def test_a_layout_that_does_not_divide_is_an_error() -> None:
    config = parse_run(keys_of(num_layers=3))
    layout = next(layout for layout in all_layouts(2, "fp32", "none") if layout.pp_size == 2)
    with pytest.raises(ConfigError, match=r"parallel\.pp_size = 2"):
        lay_out(shrunk(config), layout)
