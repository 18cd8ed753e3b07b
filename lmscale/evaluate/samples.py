"""What a model writes while it trains: monitor.samples, for the training loop to call."""

from __future__ import annotations

import numpy as np
import torch

from lmscale.config.run import RunConfig
from lmscale.data.tokenizer import document_end_id, load_tokenizer
from lmscale.evaluate.writing import Perturb, Writing, write_ids
from lmscale.feed.prompts import encode_prompts
from lmscale.parallel.seeds import hash_seed
from lmscale.train.engine import Engine

_TINY = 1.0e-20


class Samples:
    """Continues monitor.samples.prompts with the weights as they are.

    Every data-parallel rank writes the same texts. With a temperature T, the token of the largest logits / T + g is taken,
    g = -log(-log u) with u uniform: a draw from softmax(logits / T) that tensor-parallel ranks make each on its part of the
    vocabulary. The generator is its own, so training goes on as without samples.

    Args:
        engine: of the model.
        config: of the run, with monitor.samples.

    Raises:
        ConfigError: if a prompt is no text to the tokenizer, or leaves no room for the new tokens.
    Source: Maddison et al. 2014, arXiv:1411.0030, for the draw.
    """

    def __init__(self, engine: Engine, config: RunConfig):
        assert config.monitor.samples is not None
        assert config.tokenizer is not None
        self._engine, self._config, self._samples = engine, config, config.monitor.samples
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._stop = document_end_id(self._tokenizer)
        self._prompts = encode_prompts(config, self._tokenizer)

    def __call__(self, step: int) -> list[tuple[str, str]]:
        """Write a text behind each prompt.

        Args:
            step: of the run; it seeds the draws, with train.seed.

        Returns:
            (prompt, what was written behind it), the same on every rank.
        Collectives: every rank must call.
        """
        rows = self._config.batch.micro_batch_size
        count = -(-len(self._prompts) // rows)
        numbers = np.full(count * rows, -1, np.int64)
        numbers[: len(self._prompts)] = np.arange(len(self._prompts))
        writing = Writing(self._prompts, numbers.reshape(count, rows), self._samples.max_new_tokens, self._config)
        written = write_ids(self._engine, writing, self._samples.max_new_tokens, self._stop, self._perturbation(step))
        texts = [self._tokenizer.decode([*ids, *written[number]]) for number, ids in enumerate(self._prompts)]
        shown = [self._tokenizer.decode(ids) for ids in self._prompts]
        return [
            (prompt, text.removeprefix(start))
            for prompt, start, text in zip(self._samples.prompts, shown, texts, strict=True)
        ]

    def _perturbation(self, step: int) -> Perturb:
        temperature = self._samples.temperature
        if not temperature:
            return lambda logits: logits
        device = self._engine.topology.device
        generator = torch.Generator(device)
        generator.manual_seed(hash_seed("samples", self._config.train.seed, step, self._engine.topology.tp_rank))

        def perturb(logits: torch.Tensor) -> torch.Tensor:
            noise = torch.rand(logits.shape, generator=generator, device=device).clamp_(min=_TINY)
            return logits / temperature - (-noise.log()).clamp_(min=_TINY).log()

        return perturb
