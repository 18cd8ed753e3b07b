"""Imported models train as transformers' own do: logits, loss and every gradient of a step, on several layouts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from lmscale.config.io import load_run
from lmscale.convert.exporting import export_hf
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.importing import import_hf
from lmscale.convert.registry import family_to_import
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.convert.models import VOCAB_SIZE, build, save, stored
from tests.distributed.ranks import run_ranks
from tests.models.batches import Batch, make_batch

pytestmark = pytest.mark.distributed

CASES = ["gpt2", "llama", "bert", "roberta", "bart", "t5", "t5 v1.1"]
LAYOUTS = {"one rank": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2 pp2": (2, 2)}
ROWS, MICRO = 4, 2
LR = 1000.0
"""A step of plain gradient descent moves a weight by this many gradients: large, so that its rounding does not show."""
TOLERANCE = 1.0e-5
"""Of the loss, and of logits and gradients relative to the largest of their tensor."""
KEY_BIAS_TOLERANCE = 1.0e-6
"""Absolute: a key's bias moves all scores of a query alike, and its gradient is 0 but for rounding."""


Logits = list[torch.Tensor]
"""Of the words, and of the sentence pairs where there are some; empty on ranks whose stage makes none."""


def train_once_in_rank(checkpoint: str, keys: dict[str, Any], home: str) -> tuple[float, Logits]:
    """Take one step from a checkpoint's weights, save, and return the loss and the logits that it was made of."""
    from lmscale.config.io import parse_run, show
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.checkpoint import load_weights
    from lmscale.train.progress import Progress
    from lmscale.train.saving import save_checkpoint

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    engine = build_engine(config, topology, ZeroChoice(stage=0))
    load_weights(engine, CheckpointReader(Path(checkpoint)))
    batch = make_batch(config.model.architecture, 1, rows=ROWS, vocab_size=VOCAB_SIZE)
    micro = [{name: value[i : i + MICRO] for name, value in batch.items()} for i in range(0, ROWS, MICRO)]
    with recorded_logits(topology.tp_group) as seen:
        result = engine.train_step(micro if engine.reads_data else [], len(micro), 1, LR)
    save_checkpoint(engine, Path(home), Progress(step=1), show(config))
    return float(result.loss), [torch.cat(rows) for rows in zip(*seen, strict=True)]


@contextmanager
def recorded_logits(tp_group: Any) -> Iterator[list[Logits]]:
    """Note what the loss is given in each micro batch, gathered over the vocabulary: it writes gradients there."""
    from lmscale.models.loss import LanguageModelLoss

    seen: list[Logits] = []
    compute = LanguageModelLoss.__call__

    def note(loss: Any, outputs: Any, labels: Any) -> Any:
        words, *pairs = outputs if isinstance(outputs, tuple) else (outputs,)
        shards = [torch.empty_like(words) for _ in range(tp_group.size())]
        dist.all_gather(shards, words.detach().contiguous(), group=tp_group)
        seen.append([torch.cat(shards, dim=-1)[..., :VOCAB_SIZE], *(pair.detach().clone() for pair in pairs)])
        return compute(loss, outputs, labels)

    with patch.object(LanguageModelLoss, "__call__", note):
        yield seen


def run_keys(checkpoint: Path, tp_size: int, pp_size: int) -> dict[str, Any]:
    """Make the config of the step from that of the imported checkpoint."""
    keys = load_run(checkpoint / "config.yaml").model_dump()
    keys["model"] |= {"hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_dropout": 0.0}
    keys["batch"] = {"micro_batch_size": MICRO, "global_batch_size": ROWS}
    keys["optim"] = {"name": "sgd", "lr": LR, "max_grad_norm": 0.0, "weight_decay": 0.0, "lr_decay_style": "constant"}
    keys["parallel"] = {"tp_size": tp_size, "pp_size": pp_size}
    keys["deepspeed"] = {"zero_optimization": {"stage": 0}}
    if keys["objective"]["name"] == "t5":
        keys["objective"]["z_loss"] = 0.0
    return keys


def their_outputs(model: Any, batch: Batch, architecture: str) -> tuple[torch.Tensor, Logits]:
    """Compute transformers' loss of the whole batch, and its logits where there are labels for them."""
    if architecture == "gpt":
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        logits = model(input_ids=batch["tokens"]).logits
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), [logits]
    inputs = {"input_ids": batch["tokens"], "attention_mask": (batch["document_ids"] == 0).long()}
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    if architecture in ("bart", "t5"):
        out = model(**inputs, decoder_input_ids=batch["decoder_tokens"], labels=labels)
        return out.loss, [out.logits]
    places = batch["masked_positions"]
    spread = torch.full_like(batch["tokens"], -100).scatter(1, places, labels)
    if architecture == "roberta":
        # Theirs counts positions by where the padding's token id is; ours, by place.
        positions = torch.arange(2, batch["tokens"].size(1) + 2).expand_as(batch["tokens"])
        out = model(**inputs, position_ids=positions, labels=spread)
        return out.loss, [at_places(out.logits, places)]
    pairs = batch["is_random_next"].masked_fill(batch["is_random_next"] < 0, -100)
    out = model(**inputs, token_type_ids=batch["token_types"], labels=spread, next_sentence_label=pairs)
    return out.loss, [at_places(out.prediction_logits, places), out.seq_relationship_logits]


def at_places(logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Take the logits [b, s, v] of some places [b, l]: [b, l, v]."""
    return logits.gather(1, places[..., None].expand(-1, -1, logits.size(-1)))


@pytest.mark.parametrize(
    "layout",
    ["one rank", pytest.param("tp2", marks=pytest.mark.slow), pytest.param("pp2", marks=pytest.mark.slow), "tp2 pp2"],
)
@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_theirs(case: str, layout: str, tmp_path: Path) -> None:
    model = build(case)
    source = save(model, tmp_path / "hf")
    import_hf(source, tmp_path / "checkpoint")
    tp_size, pp_size = LAYOUTS[layout]
    keys = run_keys(tmp_path / "checkpoint", tp_size, pp_size)
    architecture = keys["model"]["architecture"]
    batch = make_batch(architecture, 1, rows=ROWS, vocab_size=VOCAB_SIZE)
    loss, logits = their_outputs(model, batch, architecture)
    loss.backward()
    arguments = str(tmp_path / "checkpoint"), keys, str(tmp_path / "trained")
    ranks = run_ranks(tp_size * pp_size, train_once_in_rank, *arguments)
    assert [bool(made) for _, made in ranks] == [False] * (len(ranks) - tp_size) + [True] * tp_size
    for ours, made in ranks:
        assert ours == pytest.approx(loss.item(), rel=TOLERANCE)
        if made:
            assert_same_logits(made, logits, batch["loss_mask"] > 0)
    before, after = (CheckpointReader(path) for path in (tmp_path / "checkpoint", tmp_path / "trained/step-00000001"))
    hf = HfConfig.read(source)
    family = family_to_import(hf)
    gradients = {name: value.grad for name, value in model.named_parameters()}
    compared = 0
    for one in family.table(load_run(tmp_path / "checkpoint/config.yaml").model, hf):
        moved = (before.logical(PARAMETER, one.ours) - after.logical(PARAMETER, one.ours)) / LR
        for name, ours in zip(one.theirs, one.to_theirs(moved), strict=True):
            theirs = gradients.get(name, gradients.get(family.prefix + name))
            assert theirs is not None, name
            assert_same_gradient(name, ours, theirs)
            compared += 1
    assert compared == len(gradients)


ADAFACTOR_STEPS, ADAFACTOR_LR, ADAFACTOR_VOCAB = 10, 1.0e-2, 128  # a vocabulary without rows of padding
ADAFACTOR_TOLERANCE = 1.0e-3
"""Of how far a tensor moved, both as root mean squares: an update is G / sqrt(V), so the rounding of a small gradient shows
as much as that of a large one."""


def train_by_adafactor_in_rank(checkpoint: str, keys: dict[str, Any], home: str) -> None:
    """Take some steps of Adafactor from a checkpoint's weights and save."""
    from lmscale.config.io import parse_run, show
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.checkpoint import load_weights
    from lmscale.train.progress import Progress
    from lmscale.train.saving import save_checkpoint

    config = parse_run(keys)
    engine = build_engine(config, init_topology(1, 1), ZeroChoice(stage=0))
    load_weights(engine, CheckpointReader(Path(checkpoint)))
    for step in range(1, ADAFACTOR_STEPS + 1):
        batch = make_batch("t5", step, rows=ROWS, vocab_size=ADAFACTOR_VOCAB)
        engine.train_step([batch], 1, step, ADAFACTOR_LR)
    save_checkpoint(engine, Path(home), Progress(step=ADAFACTOR_STEPS), show(config))


@pytest.mark.parametrize("case", [pytest.param("t5", marks=pytest.mark.slow), "t5 v1.1"])
def test_adafactor_moves_every_matrix_of_t5_as_theirs_does(case: str, tmp_path: Path) -> None:
    """Queries, keys, values, gate and up are tensors of their own there; two of ours hold several of them."""
    from transformers.optimization import Adafactor

    model = build(case, vocab_size=ADAFACTOR_VOCAB)
    source = save(model, tmp_path / "hf")
    import_hf(source, tmp_path / "checkpoint")
    keys = run_keys(tmp_path / "checkpoint", 1, 1)
    keys["batch"]["micro_batch_size"] = ROWS
    keys["optim"] = {"name": "adafactor", "lr": ADAFACTOR_LR, "max_grad_norm": 0.0, "weight_decay": 0.0}
    keys["optim"]["adafactor_min_dim"] = 1  # theirs factors every matrix
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = Adafactor(model.parameters())  # relative step: min(0.01, 1 / sqrt(step))
    for step in range(1, ADAFACTOR_STEPS + 1):
        optimizer.zero_grad()
        their_outputs(model, make_batch("t5", step, rows=ROWS, vocab_size=ADAFACTOR_VOCAB), "t5")[0].backward()
        optimizer.step()
    run_ranks(1, train_by_adafactor_in_rank, str(tmp_path / "checkpoint"), keys, str(tmp_path / "trained"))
    after = CheckpointReader(tmp_path / f"trained/step-{ADAFACTOR_STEPS:08d}")
    hf = HfConfig.read(source)
    ends, compared = dict(model.named_parameters()), 0
    for one in family_to_import(hf).table(load_run(tmp_path / "checkpoint/config.yaml").model, hf):
        for name, ours in zip(one.theirs, one.to_theirs(after.logical(PARAMETER, one.ours)), strict=True):
            moved = (ends[name].detach() - start[name]).square().mean().sqrt()
            apart = (ends[name].detach() - ours).square().mean().sqrt()
            assert apart < ADAFACTOR_TOLERANCE * moved, name
            compared += 1
    assert compared == len(ends)


def pass_on_in_rank(checkpoint: str, keys: dict[str, Any], home: str) -> None:
    """Load a checkpoint into this rank's share of the model and save that as it is."""
    from lmscale.config.io import parse_run, show
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.checkpoint import load_weights
    from lmscale.train.progress import Progress
    from lmscale.train.saving import save_checkpoint

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    engine = build_engine(config, topology, ZeroChoice(stage=0))
    load_weights(engine, CheckpointReader(Path(checkpoint)))
    save_checkpoint(engine, Path(home), Progress(step=1), show(config))


@pytest.mark.parametrize(
    "case", [case if case in ("bert", "t5 v1.1") else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_a_checkpoint_of_four_ranks_is_exported_to_the_bit(case: str, tmp_path: Path) -> None:
    source = save(build(case), tmp_path / "hf")
    import_hf(source, tmp_path / "checkpoint")
    keys = run_keys(tmp_path / "checkpoint", 2, 2)
    run_ranks(4, pass_on_in_rank, str(tmp_path / "checkpoint"), keys, str(tmp_path / "passed"))
    assert len(list((tmp_path / "passed/step-00000001").glob("rank-*.safetensors"))) == 4
    export_hf(tmp_path / "passed", tmp_path / "exported")
    ours, theirs = stored(tmp_path / "exported"), stored(source)
    theirs.pop("final_logits_bias", None)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_same_logits(ours: Logits, theirs: Logits, is_label: torch.Tensor) -> None:
    """Compare words' logits where there are labels, and sentence pairs' all."""
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        a, b = (a[is_label], b[is_label]) if number == 0 else (a, b)
        assert (a - b).abs().max() <= TOLERANCE * b.abs().max()


def assert_same_gradient(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare within the tolerance; of a key's bias the absolute value, alone or as a third of a fused one."""
    if name.endswith(("key.bias", "k_proj.bias")):
        assert (ours - theirs).abs().max() < KEY_BIAS_TOLERANCE, name
        return
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name
