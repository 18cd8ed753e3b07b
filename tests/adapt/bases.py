"""Small pretrained models to adapt, and runs that adapt them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.distributed.runs import GPT, LLAMA, Keys, pretrain_on_ranks, run_keys
from tests.distributed.test_objectives import keys_of, prepare

STEPS = 4
SHAPES: dict[str, Keys] = {"gpt": GPT, "llama": LLAMA, "llama-with-biases": {**LLAMA, "linear_bias": True}}
"""What is pretrained on random tokens; the others are named after their objective, which reads text."""
NO_WARMUP = {"optim__lr_warmup_tokens": 0}


def pretrain_base(corpus: str, home: Path, shape: str = "gpt", **changes: Any) -> str:
    """Train a base for two steps on one rank and return the path of its checkpoint."""
    length = {"train__train_tokens": 8 * 32 * 2, **NO_WARMUP}
    pretrain_on_ranks(1, run_keys(corpus, home / "base", model=dict(SHAPES[shape]), **length, **changes))
    return checkpoint_of(home / "base")


def checkpoint_of(run: Path) -> str:
    """Return the newest checkpoint of a run."""
    return str(sorted((run / "checkpoints").glob("step-*"))[-1])


def adapt_keys(corpus: str, base: str, output_dir: Path, adapt: Keys, **changes: Any) -> Keys:
    """Make the config of a run that adapts a base to the corpus that it was trained on."""
    usual = {
        "model": {"init_from": base},
        "train__train_tokens": 8 * 16 * STEPS,
        "optim__lr": 1.0e-2,
        "data__seq_length": 16,
        **NO_WARMUP,
    }
    return run_keys(corpus, output_dir, adapt=adapt, **{**usual, **changes})


class Bases:
    """A base of each architecture, trained for two steps where it is asked for, and runs that adapt it."""

    def __init__(self, corpus: str, home: Path):
        self._corpus, self._home = corpus, home
        self._made: dict[str, str] = {}
        self._text: tuple[str, str] | None = None
        self._references: dict[tuple[str, str], list[Keys]] = {}

    def path(self, shape: str) -> str:
        """Return the checkpoint of a base: gpt, llama, bert, roberta, bart or t5; "gpt, another" has other weights."""
        if shape not in self._made:
            home, name = self._home / shape, shape.split(",")[0]
            if name in SHAPES:
                self._made[shape] = pretrain_base(self._corpus, home, name, train__seed=1 if name == shape else 2)
            else:
                pretrain_on_ranks(1, keys_of(name, self._prepared, home, train__stop_at_step=2))
                self._made[shape] = checkpoint_of(home)
        return self._made[shape]

    @property
    def _prepared(self) -> tuple[str, str]:
        if self._text is None:
            (self._home / "text").mkdir()
            self._text = prepare(self._home / "text")
        return self._text

    def keys(self, shape: str, output_dir: Path, adapt: Keys, **changes: Any) -> Keys:
        """Make the config of a run that adapts a base to what it was trained on."""
        base, name = self.path(shape), shape.split(",")[0]
        model = {"init_from": base, **changes.pop("model", {})}
        if name in SHAPES:
            return adapt_keys(self._corpus, base, output_dir, adapt, model=model, **changes)
        steps = {"train__stop_at_step": STEPS, "optim__lr": 1.0e-2, **NO_WARMUP}
        keys = keys_of(name, self._prepared, output_dir, adapt=adapt, **{**steps, **changes})
        return {**keys, "model": model}

    def reference(self, method: str, shape: str, adapt: Keys) -> list[Keys]:
        """Return the records of a run of one rank, trained once for each method and shape."""
        if (method, shape) not in self._references:
            home = self._home / "references" / f"{method}, {shape}"
            self._references[method, shape] = pretrain_on_ranks(1, self.keys(shape, home, adapt))
        return self._references[method, shape]
