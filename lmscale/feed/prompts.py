"""The prompts of monitor.samples as ids, for the check before a run and for the ranks. No torch here."""

from __future__ import annotations

from lmscale.config.adapt import prompt_length
from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError


def encode_prompts(config: RunConfig, tokenizer: Tokenizer) -> list[list[int]]:
    """Encode the prompts of monitor.samples.

    Raises:
        ConfigError: if one is no text to the tokenizer, or leaves no room for the new tokens.
    """
    samples = config.monitor.samples
    assert samples is not None
    room = config.lengths.encoder - prompt_length(config.adapt) - samples.max_new_tokens
    encoded = [tokenizer.encode(prompt) for prompt in samples.prompts]
    for prompt, ids in zip(samples.prompts, encoded, strict=True):
        if not 0 < len(ids) <= room:
            raise ConfigError(
                f"must have from 1 to {room} tokens, to leave room for max_new_tokens, and this one has {len(ids)}",
                field="monitor.samples.prompts",
                value=prompt if len(prompt) < 40 else prompt[:37] + "...",
            )
    return encoded
