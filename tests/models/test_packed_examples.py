"""Examples that share a row of T5 lose what they lose in rows of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed

VOCAB, ENCODER, DECODER = 190, 20, 12
LENGTHS = [(7, 4), (9, 5), (4, 3)]
"""Tokens of each example, in the encoder and in the decoder: all of them fit into one row."""
TOLERANCE = 1.0e-6


def examples() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Draw (encoder tokens, decoder tokens, labels) of each example."""
    draw = torch.Generator().manual_seed(5)
    return [
        tuple(torch.randint(4, VOCAB, (size,), generator=draw) for size in (encoder, decoder, decoder))
        for encoder, decoder in LENGTHS
    ]  # type: ignore[return-value]


def row(parts: list[torch.Tensor], length: int, fill: int) -> torch.Tensor:
    """Put parts one behind the other, filled up to a length."""
    joined = torch.cat(parts)
    return torch.nn.functional.pad(joined, (0, length - joined.numel()), value=fill)[None]


def batch_of(chosen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Pack examples into one row: their number tells them apart, and positions restart."""
    encoders, decoders, labels = zip(*chosen, strict=True)

    def ids(parts: Any, length: int) -> torch.Tensor:
        return row([torch.full_like(part, number) for number, part in enumerate(parts)], length, -1)

    def places(parts: Any, length: int) -> torch.Tensor:
        return row([torch.arange(part.numel()) for part in parts], length, 0)

    decoder_ids = ids(decoders, DECODER)
    return {
        "tokens": row(list(encoders), ENCODER, 0),
        "positions": places(encoders, ENCODER),
        "document_ids": ids(encoders, ENCODER),
        "decoder_tokens": row(list(decoders), DECODER, 0),
        "decoder_positions": places(decoders, DECODER),
        "decoder_document_ids": decoder_ids,
        "labels": row(list(labels), DECODER, 0),
        "loss_mask": (decoder_ids >= 0).float(),
    }


def losses_in_rank(tp_size: int) -> tuple[float, list[float]]:
    """Return the loss of the packed row, and of each example alone."""
    from lmscale.config.io import parse_run
    from lmscale.models.build import build_model, model_specs
    from lmscale.models.context import build_context
    from lmscale.models.loss import LanguageModelLoss
    from lmscale.parallel.topology import init_topology
    from tests.models.test_architectures import MODELS, config_keys

    model_config = parse_run(config_keys(MODELS["t5"], {}, 0.0)).model
    context = build_context(model_config, init_topology(tp_size, 1), seed=1, packs_examples=True)
    loss = LanguageModelLoss(context)
    model = build_model(model_specs(context), context, loss).eval()

    def measure(batch: dict[str, torch.Tensor]) -> float:
        inputs = tuple(batch[name] for name in context.wire.input_names)
        with torch.no_grad():
            return float(loss(model(inputs), (batch["labels"], batch["loss_mask"], torch.ones(1))))

    return measure(batch_of(examples())), [measure(batch_of([example])) for example in examples()]


@pytest.mark.parametrize("tp_size", [1, 2])
def test_packed_examples_lose_as_much_as_they_do_alone(tp_size: int) -> None:
    for packed, alone in run_ranks(tp_size, losses_in_rank, tp_size):
        assert packed == pytest.approx(sum(alone), rel=TOLERANCE)
        assert min(alone) > 1.0
