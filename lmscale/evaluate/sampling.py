"""From logits to the next token."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from lmscale.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How to choose the next token.

    p = softmax(logits / temperature). top_k keeps the k likeliest tokens; of these, with p taken anew among them, top_p
    keeps the fewest of the likeliest that add up to top_p at least; one of the rest is drawn. transformers goes in the
    same order.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: None keeps all.
        top_p: None keeps all.
        seed: of the draws; None takes another one each time.

    Raises:
        ConfigError: if a value is out of range.

    Source: Holtzman et al. 2020, arXiv:1904.09751, for top_p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError("must be 0 (greedy) or more", field="temperature", value=self.temperature)
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError("must be at least 1", field="top_k", value=self.top_k, remedy="leave it out to keep all")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError("must be above 0, and at most 1", field="top_p", value=self.top_p)


class Sampler:
    """Chooses tokens as a `Sampling` says, with a generator of its own: equal seeds, equal tokens.

    Args:
        sampling: the rule.
        device: of the logits.
    """

    def __init__(self, sampling: Sampling, device: torch.device):
        self._sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each row.

        Shapes: logits float32 [b, vocab_size], without padded ids; result int64 [b].
        """
        if self._sampling.temperature == 0:
            return logits.argmax(dim=-1)
        # The largest is taken away first: divided by a tiny temperature it would overflow.
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / self._sampling.temperature
        if self._sampling.top_k is None and self._sampling.top_p is None:
            return self._draw(logits.softmax(dim=-1))
        num_kept = min(self._sampling.top_k or logits.size(-1), logits.size(-1))
        kept, ids = logits.topk(num_kept, dim=-1)
        return ids.gather(1, self._draw(self._nucleus(kept.softmax(dim=-1)))[:, None]).squeeze(1)

    def _nucleus(self, probabilities: torch.Tensor) -> torch.Tensor:
        """Set to 0 what top_p drops of probabilities that fall along each row; the first always stays."""
        if self._sampling.top_p is None:
            return probabilities
        before = probabilities.cumsum(dim=-1) - probabilities
        is_dropped = before >= self._sampling.top_p
        is_dropped[:, 0] = False
        return probabilities.masked_fill(is_dropped, 0.0)

    def _draw(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(weights, 1, generator=self._generator).squeeze(1)
