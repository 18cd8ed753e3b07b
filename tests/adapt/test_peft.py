"""LoRA computes what peft's does with the same weights, and has the same gradients."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lmscale.convert.importing import import_hf
from tests.convert.models import VOCAB_SIZE, build, save
from tests.convert.test_numbers import largest_error, some_tokens
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import Keys

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
RANK, ALPHA = 3, 12.0
Tensors = dict[str, torch.Tensor]

CASES: dict[str, tuple[list[str], list[str], dict[str, str]]] = {
    "gpt2": (
        ["c_attn", "c_fc"],
        ["qkv", "fc1"],
        {
            "transformer.h.{}.attn.c_attn": "layers.{}.attention.linear_qkv.lora.qkv",
            "transformer.h.{}.mlp.c_fc": "layers.{}.mlp.linear_fc1.lora.fc1",
        },
    ),
    "llama": (
        ["q_proj", "v_proj", "o_proj", "up_proj"],
        ["query", "value", "proj", "up"],
        {
            "model.layers.{}.self_attn.q_proj": "layers.{}.attention.linear_qkv.lora.query",
            "model.layers.{}.self_attn.v_proj": "layers.{}.attention.linear_qkv.lora.value",
            "model.layers.{}.self_attn.o_proj": "layers.{}.attention.linear_proj.lora.proj",
            "model.layers.{}.mlp.up_proj": "layers.{}.mlp.linear_fc1.lora.up",
        },
    ),
    "roberta": (
        ["query", "value"],
        ["query", "value"],
        {
            "roberta.encoder.layer.{}.attention.self.query": "layers.{}.attention.linear_qkv.lora.query",
            "roberta.encoder.layer.{}.attention.self.value": "layers.{}.attention.linear_qkv.lora.value",
        },
    ),
}
"""By case of tests.convert.models: peft's targets, ours, and which of its modules is which pair."""


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    theirs_targets, targets, places = CASES[case]
    model = build(case)
    import_hf(save(model, tmp_path / "source"), tmp_path / "checkpoint")
    peft = with_peft(model, theirs_targets)
    names = named_pairs(peft, places)
    adapt = {"method": "lora", "rank": RANK, "alpha": ALPHA, "targets": targets}
    given = {ours: rows_of(case, ours, parameter.detach()) for ours, parameter in names.items()}
    (found,) = run_ranks(1, compute, str(tmp_path / "checkpoint"), str(tmp_path), adapt, given)
    tokens = some_tokens()
    logits = peft(input_ids=tokens).logits
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert largest_error(found["logits"], logits.detach()) <= TOLERANCE
    assert set(found) == {"logits", *names}
    for name, parameter in names.items():
        assert parameter.grad is not None
        assert largest_error(found[name], rows_of(case, name, parameter.grad)) <= TOLERANCE, name


def with_peft(model: Any, targets: list[str]) -> Any:
    """Put peft's LoRA into a model, with an A and a B that do something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what peft's imports warn of is theirs
        from peft import LoraConfig, get_peft_model

        is_gpt2 = "c_attn" in targets
        keys = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets, "fan_in_fan_out": is_gpt2}
        adapted = get_peft_model(model, LoraConfig(**keys))
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.1, generator=generator)
    return adapted.eval()


def named_pairs(peft: Any, places: dict[str, str]) -> dict[str, torch.nn.Parameter]:
    """Return peft's parameters by our names; every one of them has one."""
    parameters = {name: p for name, p in peft.named_parameters() if p.requires_grad}
    named: dict[str, torch.nn.Parameter] = {}
    for theirs, ours in places.items():
        for index in range(peft.config.num_hidden_layers):
            for matrix in ("a", "b"):
                name = f"base_model.model.{theirs}.lora_{matrix.upper()}.default.weight".format(index)
                named[f"{ours}.{matrix}".format(index)] = parameters.pop(name)
    assert not parameters
    return named


def rows_of(case: str, name: str, matrix: torch.Tensor) -> torch.Tensor:
    """Put the rows of a B that is beside GPT-2's queries, keys and values in the order of our tensor: head by head."""
    if case != "gpt2" or not name.endswith("qkv.b"):
        return matrix
    heads = 4
    return matrix.view(3, heads, -1, matrix.size(1)).transpose(0, 1).reshape(matrix.shape)


def compute(checkpoint: str, home: str, adapt: Keys, given: Tensors) -> Tensors:
    """Return, on this rank of a pool, the logits of the adapted model and the gradients of what is trained."""
    from lmscale.config.io import parse_run
    from lmscale.config.run import ZeroChoice
    from lmscale.models.build import logical_name
    from lmscale.parallel.topology import init_topology
    from lmscale.plan.adaptation import adaptation_of
    from lmscale.pretrain import build_engine
    from lmscale.train.start import begin

    tokens = some_tokens()
    config = parse_run(
        {
            "model": {"init_from": checkpoint},
            "adapt": adapt,
            "data": {"train": [{"prefix": "unread"}], "seq_length": tokens.size(1)},
            "batch": {"micro_batch_size": 2, "global_batch_size": 2},
            "optim": {"lr": 1.0e-3},
            "train": {"train_tokens": 1000},
            "deepspeed": {"zero_optimization": {"stage": 0}},
            "output_dir": f"{home}/run",
        }
    )
    engine = build_engine(config, init_topology(1, 1), ZeroChoice())
    begin(engine, config, adaptation_of(config))
    model = engine.model.eval()
    trained = {logical_name(model, name): p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, value in given.items():
            trained.pop(name).copy_(value)
    assert not trained
    everywhere = torch.arange(tokens.size(1)).expand_as(tokens)
    fields = {
        "tokens": tokens,
        "document_ids": torch.ones_like(tokens),
        "token_types": torch.zeros_like(tokens),
        "positions": everywhere,
        "masked_positions": everywhere,
    }
    inputs = tuple(fields[name] for name in engine.context.wire.input_names)
    logits = model(inputs if len(inputs) > 1 else tokens)[..., :VOCAB_SIZE]
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    named = ((logical_name(model, name), parameter.grad) for name, parameter in model.named_parameters())
    grads = {name: grad for name, grad in named if grad is not None}
    return {"logits": logits.detach(), **grads}
