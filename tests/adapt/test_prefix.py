"""Prefixes: counts, layouts, what they leave alone, what they begin as, and PEFT's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.adapt.prefix import fixed, materialize
from lmscale.config.adapt import PrefixTuningConfig, PTuningV2Config
from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.config.model import ModelConfig
from lmscale.evaluate.loading import read_config
from lmscale.plan.adaptation import attentions, own_shapes
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.adapt.text_bases import LAYOUTS, STEPS, TextBases, compute, trained_names
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks
from tests.distributed.test_objectives import HALF_TOLERANCE, prepared  # noqa: F401

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""Relative, losses and gradient norms over the steps in fp32, and logits against PEFT's: sums in another order."""
SAME = 1.0e-6
"""max |a - b| / max |b| of the same values by one more matrix product."""
NO_RATE = 1.0e-30
"""Leaves weights as they begin: a rate must be above 0."""
LENGTH = 4
METHODS: dict[str, Keys] = {
    "direct": {"method": "prefix_tuning", "length": LENGTH, "projection": None},
    "network": {"method": "prefix_tuning", "length": LENGTH, "projection": 12},
    "v2": {"method": "p_tuning_v2", "length": LENGTH, "dropout": 0.0},
}


@pytest.fixture(scope="module")
def bases(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> TextBases:  # noqa: F811
    return TextBases(prepared, tmp_path_factory.mktemp("bases"))


@pytest.mark.parametrize(
    ("architecture", "num_layers", "adapt", "count"),
    [
        ("gpt", 24, PrefixTuningConfig(length=10, projection=None), 491_520),
        ("bart", 12, PrefixTuningConfig(length=200, projection=None), 14_745_600),
        ("bert", 24, PTuningV2Config(length=20), 983_040),
    ],
    ids=["GPT-2 medium", "BART large", "BERT large"],
)
def test_counts_are_those_of_the_papers(
    architecture: Any, num_layers: int, adapt: PrefixTuningConfig | PTuningV2Config, count: int
) -> None:
    model = ModelConfig(
        architecture=architecture, num_layers=num_layers, hidden_size=1024, num_attention_heads=16, vocab_size=1000
    )
    assert sum(math.prod(shape) for shape in own_shapes(model, adapt).values()) == count


QUICK = {
    ("gpt", "direct", "sp"),
    ("gpt", "network", "tp2-pp2"),
    ("bert", "v2", "tp2"),
    ("bert", "network", "dp2-zero3-full"),
    ("bart", "network", "tp2-pp2"),
    ("bart", "direct", "selective"),
    ("t5", "network", "pp2-full"),
    ("t5", "network", "sp"),
    ("t5", "direct", "dp2-zero2"),
}
CASES = [
    pytest.param(a, m, l, marks=[] if (a, m, l) in QUICK else [pytest.mark.slow])
    for a in ("gpt", "bert", "roberta", "bart", "t5")
    for m in METHODS
    for l in LAYOUTS
]


@pytest.mark.parametrize(("architecture", "method", "layout"), CASES)
def test_layouts_train_alike(architecture: str, method: str, layout: str, bases: TextBases, tmp_path: Path) -> None:
    reference = bases.reference(f"{architecture}-{method}", architecture, METHODS[method])
    ranks, changes = LAYOUTS[layout]
    run = pretrain_on_ranks(ranks, bases.keys(architecture, METHODS[method], tmp_path, **changes))
    assert len(run) == STEPS
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < TOLERANCE


@pytest.mark.parametrize(
    ("architecture", "precision", "layout"),
    [
        ("gpt", "bf16", "tp2-pp2"),
        pytest.param("t5", "fp16", "dp2-zero2", marks=pytest.mark.slow),
        pytest.param("bart", "bf16", "dp2-zero3-full", marks=pytest.mark.slow),
    ],
)
def test_half_precision_follows_fp32(
    architecture: str, precision: str, layout: str, bases: TextBases, tmp_path: Path
) -> None:
    reference = bases.reference(f"{architecture}-network", architecture, METHODS["network"])
    ranks, changes = LAYOUTS[layout]
    scale = {"loss_scale": {"initial": 256}} if precision == "fp16" else {}
    keys = bases.keys(architecture, METHODS["network"], tmp_path, precision=precision, **scale, **changes)
    run = pretrain_on_ranks(ranks, keys)
    assert largest_difference(losses(run), losses(reference)) < HALF_TOLERANCE[precision]


@pytest.mark.parametrize(
    ("architecture", "method", "layout"),
    [
        ("bart", "network", "tp2-pp2"),
        pytest.param("t5", "direct", "sp", marks=pytest.mark.slow),
        pytest.param("gpt", "network", "dp2-zero3", marks=pytest.mark.slow),
    ],
)
def test_the_prefix_alone_is_trained_and_saved(
    architecture: str, method: str, layout: str, bases: TextBases, tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    keys = bases.keys(architecture, METHODS[method], tmp_path, **changes)
    names = trained_names(ranks, keys)
    reader = CheckpointReader(find_checkpoint(tmp_path / "checkpoints"))
    config = read_config(reader.path)
    shapes = own_shapes(config.model, config.adapt)
    assert names == set(shapes)
    assert reader.shapes() == shapes


@pytest.mark.parametrize(
    ("architecture", "layout"),
    [("bart", "tp2-pp2"), pytest.param("gpt", "dp2-zero3", marks=pytest.mark.slow)],
)
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(
    architecture: str, layout: str, bases: TextBases, tmp_path: Path
) -> None:
    adapt = {**METHODS["network"], "dropout": 0.1, "init": "text", "init_text": "the cat sees a house"}
    ranks, changes = LAYOUTS[layout]
    whole = pretrain_on_ranks(ranks, bases.keys(architecture, adapt, tmp_path / "whole", **changes))
    keys = bases.keys(architecture, adapt, tmp_path / "parts", **changes)
    keys["train"]["stop_at_step"] = 1
    pretrain_on_ranks(ranks, keys)
    keys["train"]["stop_at_step"] = STEPS
    run = pretrain_on_ranks(ranks, keys)
    assert losses(run) == losses(whole)
    assert norms(run) == norms(whole)


def _trained(bases: TextBases, architecture: str, adapt: Keys, home: Path, **changes: Any) -> CheckpointReader:
    pretrain_on_ranks(1, bases.keys(architecture, adapt, home, **changes))
    return CheckpointReader(find_checkpoint(home / "checkpoints"))


def _tensors(reader: CheckpointReader) -> dict[str, torch.Tensor]:
    return {name: reader.logical(PARAMETER, name).clone() for name in reader.shapes()}


def _gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_a_materialized_prefix_computes_what_its_network_does(bases: TextBases, tmp_path: Path) -> None:
    reader = _trained(bases, "bart", METHODS["network"], tmp_path)
    config, tensors = read_config(reader.path), _tensors(reader)
    tables = materialize(tensors, config.model, config.adapt)
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, 400, (2, 12), generator=draw)
    ids = torch.zeros_like(tokens)
    inputs = {
        "tokens": tokens,
        "document_ids": ids,
        "decoder_tokens": tokens[:, :7],
        "decoder_document_ids": ids[:, :7],
    }
    base = bases.base("bart")
    with_network, _ = compute(base, METHODS["network"], tensors, inputs)
    with_tables, _ = compute(base, fixed(config.adapt).model_dump(), tables, inputs)
    assert set(tables) == {f"{name}.prefix.table" for name, _, _ in attentions(config.model)}
    assert _gap(with_tables, with_network) < SAME


@pytest.mark.parametrize("network", [False, True])
def test_rows_of_several_prefixes_compute_what_each_alone_does(network: bool, bases: TextBases) -> None:
    base = bases.base("gpt")
    model = read_config(Path(base)).model
    keys = METHODS["network" if network else "direct"]
    draw = torch.Generator().manual_seed(2)
    one, three = PrefixTuningConfig(**keys), PrefixTuningConfig(**keys, entries=3)
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in own_shapes(model, three).items()}
    assert own_shapes(model, three) == {name: (3, *shape) for name, shape in own_shapes(model, one).items()}
    tokens = torch.randint(10, 400, (2, 9), generator=draw)
    together, grads = compute(
        base,
        three.model_dump(),
        tensors,
        {"tokens": tokens, "adapter_ids": torch.tensor([2, 0])},
        torch.ones(()),
    )
    for row, entry in ((0, 2), (1, 0)):
        alone, of_one = compute(
            base,
            one.model_dump(),
            {name: tensor[entry] for name, tensor in tensors.items()},
            {"tokens": tokens[row : row + 1]},
            torch.ones(()),
        )
        assert _gap(together[row], alone[0]) < TOLERANCE
        for name, grad in of_one.items():
            torch.testing.assert_close(grads[name][entry], grad, rtol=1.0e-4, atol=1.0e-5 * float(grad.abs().max()))
    assert all(not grad[1].any() for grad in grads.values())


@pytest.mark.parametrize("layout", ["tp2-pp2", "dp2-zero3"])
def test_a_prefix_of_a_text_begins_as_the_text_in_front(layout: str, bases: TextBases, tmp_path: Path) -> None:
    adapt = {**METHODS["direct"], "init": "text", "init_text": "the cat sees"}
    ranks, changes = LAYOUTS[layout]
    pretrain_on_ranks(
        ranks, bases.keys("gpt", adapt, tmp_path, optim__lr=NO_RATE, **{**changes, "train__stop_at_step": 1})
    )
    reader = CheckpointReader(find_checkpoint(tmp_path / "checkpoints"))
    from lmscale.data.tokenizer import load_tokenizer

    text = load_tokenizer(read_config(reader.path).tokenizer).encode("the cat sees")
    front = torch.tensor([(text * LENGTH)[:LENGTH]])
    tokens = torch.randint(10, 400, (1, 9), generator=torch.Generator().manual_seed(3))
    base = bases.base("gpt")
    ours, _ = compute(base, METHODS["direct"], _tensors(reader), {"tokens": tokens})
    whole, _ = compute(base, None, {}, {"tokens": torch.cat((front, tokens), dim=1)})
    assert _gap(ours, whole[:, LENGTH:]) < TOLERANCE


def test_a_network_of_a_text_comes_nearer_to_its_keys_and_values(bases: TextBases, tmp_path: Path) -> None:
    text = {"init": "text", "init_text": "birds sing"}
    still = {"optim__lr": NO_RATE, "train__stop_at_step": 1}
    tables = _tensors(_trained(bases, "t5", {**METHODS["direct"], **text}, tmp_path / "tables", **still))
    fitted = _trained(bases, "t5", {**METHODS["network"], **text}, tmp_path / "fitted", **still)
    drawn = _trained(bases, "t5", METHODS["network"], tmp_path / "drawn", **still)
    config = read_config(fitted.path)
    errors = []
    for reader in (fitted, drawn):
        made = materialize(_tensors(reader), config.model, config.adapt)
        errors.append(sum(float((made[name] - table).square().mean()) for name, table in tables.items()))
    assert errors[0] < 0.9 * errors[1]


def test_a_text_that_sequence_parallelism_cannot_split_begins_alike(bases: TextBases, tmp_path: Path) -> None:
    adapt = {**METHODS["direct"], "length": 5, "init": "text", "init_text": "the cat sees a red house"}
    still = {"optim__lr": NO_RATE, "train__stop_at_step": 1}
    one = _tensors(_trained(bases, "bert", adapt, tmp_path / "one", **still))
    ranks, changes = LAYOUTS["sp"]
    pretrain_on_ranks(ranks, bases.keys("bert", adapt, tmp_path / "sp", **changes, **still))
    two = _tensors(CheckpointReader(find_checkpoint(tmp_path / "sp" / "checkpoints")))
    assert two.keys() == one.keys()
    assert all(_gap(two[name], table) < TOLERANCE for name, table in one.items())
