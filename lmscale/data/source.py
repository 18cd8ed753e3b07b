"""What an objective reads: a corpus, or a part of it, cut into samples."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import BartConfig, BertConfig, ObjectiveConfig, RobertaConfig, TextToTextConfig
from lmscale.data.blocks import Blocks, SentenceBlocks
from lmscale.data.examples import Examples
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.pairs import SentencePairs
from lmscale.data.part import Part
from lmscale.data.samples import Samples
from lmscale.data.windows import Windows


class Source(Protocol):
    """A way to cut a corpus into the samples of epochs 0, 1, 2, ..."""

    corpus: IndexedCorpus
    period: int | None
    """Epoch e has as many samples as epoch e + period; 1 where all have the same, None where none need have."""

    def num_samples(self, epoch: int = 0) -> int:
        """Return the samples of an epoch, at least one."""
        ...

    def read(self, keys: NDArray[np.int64]) -> Samples:
        """Read samples by their keys, int64 [n, 4]: epoch and number, from 0, say which; see `Samples`."""
        ...


def build_source(
    objective: ObjectiveConfig, lengths: SampleLengths, part: Part, seed: int, number: int = 0, isolate: bool = False
) -> Source:
    """Build the source of an objective. This checks the part by its counts; what takes longer waits until it is read.

    Args:
        objective: what decides how the part is cut.
        lengths: of the samples.
        part: the documents.
        seed: of the run.
        number: of the source among those of the run.
        isolate: number the documents of each sample; causal_lm only.

    Raises:
        DataError: if the part cannot be cut so.
    """
    if isinstance(objective, BertConfig):
        return SentencePairs(part, lengths.raw, objective.short_share, objective.static_copies, seed, number)
    if isinstance(objective, RobertaConfig | BartConfig):
        if objective.packing == "blocks":
            return Blocks(part, lengths.raw, keep_ends=True)
        return SentenceBlocks(part, lengths.raw, objective.packing)
    if isinstance(objective, TextToTextConfig):
        return Examples(part, lengths, objective.packed)
    if objective.name == "t5":
        return Blocks(part, lengths.raw, keep_ends=False)
    return Windows(part.corpus, (part.first, part.behind), lengths.raw - 1, part.name, isolate)
