"""What a run reads: tokenizer and corpora."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from lmscale.config.base import Section
from lmscale.errors import ConfigError


class TokenizerConfig(Section):
    """The tokenizer that made the corpora: training needs its vocabulary and document end; checkpoints keep a copy."""

    type: Literal["sentencepiece", "hf"] = "sentencepiece"
    """sentencepiece: a .model file or the directory that `lmscale tokenizer train` wrote; hf: a directory for
    transformers' AutoTokenizer (needs lmscale[hf])."""
    path: str
    """The file or directory."""


class TrainSource(Section):
    """One corpus of the training blend."""

    prefix: str
    """PREFIX.bin and PREFIX.idx, as `lmscale tokenize` (or Megatron's preprocessing) wrote them, or PREFIX.shards.json."""
    weight: float = Field(1.0, gt=0)
    """Share of the blend, in samples, relative to the other sources."""


class ValidSource(Section):
    """One held-out corpus."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Its name in the metrics: valid/NAME/lm_loss."""
    prefix: str
    """PREFIX.bin and PREFIX.idx, or PREFIX.shards.json."""


class SeqLengthStage(Section):
    """Steps of one sequence length."""

    seq_length: int = Field(gt=0, le=100_000_000)
    """Tokens of a sample: a window of data.seq_length is cut to its first seq_length tokens."""
    until_tokens: int = Field(gt=0)
    """Consumed tokens, from the start of the run, at which the next stage begins."""


class DataConfig(Section):
    """Corpora and how they are cut into samples."""

    train: list[TrainSource] = []
    """The blend to train on; required, but for a run with a task."""
    valid: list[ValidSource] = []
    """Held-out corpora, each read whole; left out, the valid share of `split` of each training source is held out."""
    split: str = "98,1,1"
    """Shares of train, valid and test in each training source, by documents; the parts do not overlap. With `valid`
    given, "1,0,0" trains on everything."""
    seq_length: int = Field(gt=0, le=100_000_000)
    """Tokens of a sample that the model sees: the encoder, for bart and t5; the vectors of prompt tuning count in."""
    seq_length_stages: list[SeqLengthStage] = []
    """Shorter lengths to train on before seq_length, in order; causal_lm only. What is cut off a window waits for the next
    epoch; evaluation reads whole windows."""
    decoder_seq_length: int | None = Field(None, gt=0)
    """Tokens of a sample that the decoder of bart or t5 sees; left out, seq_length for bart and text_to_text, and for
    t5 what the noise leaves for it (114 of 512)."""
    reset_attention_mask: bool = False
    """Isolate packed documents: attention stays inside a document, positions restart, and the first token of the next
    document is not a label."""
    shared_filesystem: bool = True
    """All hosts see the same files; false: each has copies of its own at the same paths, which are compared by content
    before the first step. Nothing is built from them on disk."""
    num_workers: int = Field(1, ge=0)
    """Processes that prepare batches ahead of the step; 0 prepares them in the training process."""


def split_shares(split: str) -> tuple[float, float, float]:
    """Parse "98,1,1" into the fractions of train, valid and test.

    Raises:
        ConfigError: if it is not three numbers of at least 0, the first of them above 0.
    """
    try:
        parts = [float(part) for part in split.split(",")]
    except ValueError:
        parts = []
    if len(parts) != 3 or not all(0 <= part < math.inf for part in parts) or parts[0] <= 0:
        raise ConfigError(
            "must be three numbers, train,valid,test, train above 0",
            field="data.split",
            value=split,
            remedy='as in "98,1,1"',
        )
    total = sum(parts)
    return parts[0] / total, parts[1] / total, parts[2] / total
