"""Hand-made batches of each architecture, with padding, and some of it without labels."""

from __future__ import annotations

import torch

Batch = dict[str, torch.Tensor]
FIRST_TOKEN = 4
"""Ids below it are left alone: they are padding to one library or another."""


def make_batch(
    architecture: str, step: int, *, rows: int, vocab_size: int, length: int = 16, targets: int = 8, places: int = 4
) -> Batch:
    """Draw a batch: a function of its arguments."""
    draw = torch.Generator().manual_seed(step)

    def tokens(columns: int) -> torch.Tensor:
        return torch.randint(FIRST_TOKEN, vocab_size, (rows, columns), generator=draw)

    def ids(columns: int) -> torch.Tensor:
        lengths = torch.randint(columns // 2, columns + 1, (rows, 1), generator=draw)
        return (torch.arange(columns) >= lengths).long().neg()

    if architecture == "gpt":
        mask = (torch.rand(rows, length, generator=draw) > 0.2).float()
        return {"tokens": tokens(length), "labels": tokens(length), "loss_mask": mask}
    batch = {"tokens": tokens(length), "document_ids": ids(length)}
    if architecture in ("bart", "t5"):
        decoder_ids = ids(targets)
        batch |= {"decoder_tokens": tokens(targets), "decoder_document_ids": decoder_ids}
        return batch | {"labels": tokens(targets), "loss_mask": (decoder_ids == 0).float()}
    # The first half of a row is never padding.
    chosen = torch.rand(rows, length // 2, generator=draw).argsort(dim=1)[:, :places].sort(dim=1).values
    mask = (torch.rand(rows, places, generator=draw) > 0.3).float()
    batch |= {"masked_positions": chosen, "labels": tokens(places), "loss_mask": mask}
    if architecture == "bert":
        batch["token_types"] = (torch.arange(length) > 5).long().repeat(rows, 1)
        batch["is_random_next"] = torch.randint(-1, 2, (rows,), generator=draw)
    return batch
