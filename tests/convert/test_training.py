"""Imported models train as transformers' own do: the loss and every gradient of a step, on several layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lmscale.config.io import load_run
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.importing import import_hf
from lmscale.convert.registry import family_to_import
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.convert.models import VOCAB_SIZE, build, save
from tests.distributed.ranks import run_ranks
from tests.models.batches import Batch, make_batch

pytestmark = pytest.mark.distributed

CASES = ["gpt2", "llama", "bert", "roberta", "bart", "t5", "t5 v1.1"]
LAYOUTS = {"one rank": (1, 1), "tp2": (2, 1), "pp2": (1, 2), "tp2 pp2": (2, 2)}
ROWS, MICRO = 4, 2
LR = 1000.0
"""A step of plain gradient descent moves a weight by this many gradients: large, so that its rounding does not show."""
TOLERANCE = 1.0e-5
"""Of the loss, and of a gradient relative to the largest of its tensor."""
KEY_BIAS_TOLERANCE = 1.0e-6
"""Absolute: a key's bias moves all scores of a query alike, and its gradient is 0 but for rounding."""


def train_once_in_rank(checkpoint: str, keys: dict[str, Any], home: str) -> float:
    """Take one step from a checkpoint's weights, save, and return the loss."""
    from lmscale.config.io import parse_run, show
    from lmscale.config.run import ZeroChoice
    from lmscale.parallel.topology import init_topology
    from lmscale.pretrain import build_engine
    from lmscale.train.checkpoint import load_checkpoint, save_checkpoint
    from lmscale.train.progress import Progress

    config = parse_run(keys)
    topology = init_topology(config.parallel.tp_size, config.parallel.pp_size)
    engine = build_engine(config, topology, ZeroChoice(stage=0))
    load_checkpoint(engine, CheckpointReader(Path(checkpoint)), weights_only=True)
    batch = make_batch(config.model.architecture, 1, rows=ROWS, vocab_size=VOCAB_SIZE)
    micro = [{name: value[i : i + MICRO] for name, value in batch.items()} for i in range(0, ROWS, MICRO)]
    result = engine.train_step(micro if engine.reads_data else [], len(micro), 1, LR)
    save_checkpoint(engine, Path(home), Progress(step=1), show(config), None, 0)
    return float(result.loss)


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


def their_loss(model: Any, batch: Batch, architecture: str) -> torch.Tensor:
    """Compute transformers' loss of the whole batch."""
    if architecture == "gpt":
        labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
        return F.cross_entropy(model(input_ids=batch["tokens"]).logits.flatten(0, 1), labels.flatten())
    inputs = {"input_ids": batch["tokens"], "attention_mask": (batch["document_ids"] == 0).long()}
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    if architecture in ("bart", "t5"):
        loss: torch.Tensor = model(**inputs, decoder_input_ids=batch["decoder_tokens"], labels=labels).loss
        return loss
    spread = torch.full_like(batch["tokens"], -100).scatter(1, batch["masked_positions"], labels)
    if architecture == "roberta":
        # Theirs counts positions by where the padding's token id is; ours, by place.
        places = torch.arange(2, batch["tokens"].size(1) + 2).expand_as(batch["tokens"])
        return model(**inputs, position_ids=places, labels=spread).loss
    pairs = batch["is_random_next"].masked_fill(batch["is_random_next"] < 0, -100)
    return model(**inputs, token_type_ids=batch["token_types"], labels=spread, next_sentence_label=pairs).loss


@pytest.mark.parametrize(
    "layout",
    ["one rank", pytest.param("tp2", marks=pytest.mark.slow), pytest.param("pp2", marks=pytest.mark.slow), "tp2 pp2"],
)
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_theirs(case: str, layout: str, tmp_path: Path) -> None:
    model = build(case)
    source = save(model, tmp_path / "hf")
    import_hf(source, tmp_path / "checkpoint")
    tp_size, pp_size = LAYOUTS[layout]
    keys = run_keys(tmp_path / "checkpoint", tp_size, pp_size)
    architecture = keys["model"]["architecture"]
    loss = their_loss(model, make_batch(architecture, 1, rows=ROWS, vocab_size=VOCAB_SIZE), architecture)
    loss.backward()
    arguments = str(tmp_path / "checkpoint"), keys, str(tmp_path / "trained")
    for ours in run_ranks(tp_size * pp_size, train_once_in_rank, *arguments):
        assert ours == pytest.approx(loss.item(), rel=TOLERANCE)
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


def assert_same_gradient(name: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare within the tolerance; of a key's bias the absolute value, alone or as a third of a fused one."""
    if name.endswith(("key.bias", "k_proj.bias")):
        assert (ours - theirs).abs().max() < KEY_BIAS_TOLERANCE, name
        return
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max(), name
