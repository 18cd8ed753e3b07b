"""The objectives by name: the one line that a new objective adds outside its own module and config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lmscale.config.lengths import SampleLengths
from lmscale.config.objective import ObjectiveConfig
from lmscale.objectives.bart import Bart
from lmscale.objectives.base import Objective, Vocabulary
from lmscale.objectives.bert import Bert
from lmscale.objectives.causal_lm import CausalLM
from lmscale.objectives.roberta import Roberta
from lmscale.objectives.t5 import T5
from lmscale.objectives.text_to_text import TextToText

_BUILDERS: dict[str, Callable[[Any, SampleLengths, Vocabulary], Objective]] = {
    "causal_lm": lambda config, lengths, vocabulary: CausalLM(config.prefix_lm),
    "bert": Bert,
    "roberta": Roberta,
    "bart": Bart,
    "t5": T5,
    "text_to_text": TextToText,
}


def build_objective(objective: ObjectiveConfig, lengths: SampleLengths, vocabulary: Vocabulary) -> Objective:
    """Build the objective that a config names.

    Args:
        objective: its section.
        lengths: of the run's samples.
        vocabulary: of the run's tokenizer; for causal_lm its size is enough.

    Raises:
        DataError: if the tokenizer lacks what the objective needs.
    """
    return _BUILDERS[objective.name](objective, lengths, vocabulary)
