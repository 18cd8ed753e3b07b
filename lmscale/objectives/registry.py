"""The objectives by name: the one line that a new objective adds outside its own module and config."""

from __future__ import annotations

from collections.abc import Callable

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import ObjectiveConfig
from lmscale.objectives.base import Objective, Vocabulary
from lmscale.objectives.causal_lm import CausalLM

_BUILDERS: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    "causal_lm": lambda config: CausalLM(),
}


def build_objective(config: ObjectiveConfig, lengths: SampleLengths, vocabulary: Vocabulary) -> Objective:
    """Build the objective that a config names."""
    return _BUILDERS[config.name](config)
