"""Random bases and random adaptations of them, written as training writes them, without training."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from lmscale.config.io import parse_run, show
from lmscale.convert.native import NativeWriter
from lmscale.plan.adaptation import adaptation_of
from lmscale.plan.names import parameter_shapes
from lmscale.train.base import BaseModel, hash_weights
from lmscale.train.checkpoint_reader import CheckpointReader

Keys = dict[str, Any]
SIZES: Keys = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 48,
}
MODELS: dict[str, Keys] = {
    "gpt": SIZES,
    "llama": {
        **SIZES,
        "num_query_groups": 2,
        "ffn_hidden_size": 48,
        "position_embedding": "rope",
        "normalization": "rmsnorm",
        "activation": "swiglu",
        "linear_bias": False,
        "tied_head": False,
    },
    "bert": {**SIZES, "architecture": "bert", "next_sentence_head": False},
    "roberta": {**SIZES, "architecture": "roberta", "position_offset": 2, "token_types": 1},
    "bart": {**SIZES, "architecture": "bart"},
    "t5": {**SIZES, "architecture": "t5", "ffn_hidden_size": 48, "activation": "geglu", "relative_buckets": 8},
}
BASE_STD, ADAPTATION_STD = 0.1, 0.3
"""Of random weights: the base's as of a trained model, so that it does not enlarge rounding; an adaptation's large enough
that logits differ by much."""


def _run(model: Keys, **sections: Any) -> Any:
    return parse_run(
        {
            "model": dict(model),
            "data": {"train": [{"prefix": "nowhere"}], "seq_length": 16},
            "batch": {"micro_batch_size": 2, "global_batch_size": 2},
            "optim": {"lr": 1e-3},
            "train": {"train_tokens": 1000},
            "output_dir": "nowhere",
            **sections,
        }
    )


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator, std: float) -> torch.Tensor:
    values = torch.randn(shape, generator=generator) * std
    is_norm = name.endswith("norm.weight")
    return 1.0 + 0.3 * values if is_norm else values


def write_base(directory: Path, model: str, seed: int = 0, tokenizer: Path | None = None, **changes: Any) -> Path:
    """Write a random model; `changes` are of its sizes."""
    directory.mkdir(parents=True)
    sections = {} if tokenizer is None else {"tokenizer": {"path": str(tokenizer)}}
    config = _run({**MODELS[model], **changes}, **sections)
    generator = torch.Generator().manual_seed(seed)
    if tokenizer is not None:
        shutil.copytree(tokenizer, directory / "tokenizer")
    writer = NativeWriter(directory)
    for name, shape in parameter_shapes(config.model).items():
        writer.add(name, _draw(name, shape, generator, BASE_STD))
    writer.finish(show(config))
    return directory


def write_adaptation(
    directory: Path, base: Path, adapt: Keys, seed: int = 1, scale: float = 1.0, **sections: Any
) -> Path:
    """Write a random adaptation of a base."""
    directory.mkdir(parents=True)
    config, generator = _run({"init_from": str(base)}, adapt=adapt, **sections), torch.Generator().manual_seed(seed)
    adaptation, reader = adaptation_of(config), CheckpointReader(base)
    assert adaptation is not None
    writer = NativeWriter(directory)
    for name, shape in adaptation.shapes().items():
        if adaptation.trains(name):
            writer.add(name, _draw(name, shape, generator, ADAPTATION_STD * scale))
    writer.finish(show(config), BaseModel(base.absolute(), hash_weights(reader)))
    return directory


def logits_of(checkpoint: str, **options: Any) -> torch.Tensor:
    """Load a checkpoint and compute logits; to be run on ranks."""
    import lmscale

    return model_logits(lmscale.load(checkpoint, "cpu", "fp32", **options))


def model_logits(model: Any, num_rows: int = 3, length: int = 12) -> torch.Tensor:
    """Compute logits of the same random tokens, whatever the architecture."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(8, 120, (num_rows, length), generator=generator)
    kind = model.config.model
    if kind.has_decoder_stack:
        return model.logits(tokens, torch.randint(8, 120, (num_rows, 7), generator=generator))
    if kind.is_encoder_only:
        return model.logits(tokens, torch.arange(length).expand(num_rows, -1))
    return model.logits(tokens)
