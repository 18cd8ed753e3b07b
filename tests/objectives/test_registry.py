from __future__ import annotations

import numpy as np
import pytest

from lmscale.config.objective import (
    OBJECTIVES_OF,
    BartConfig,
    BertConfig,
    CausalLMConfig,
    RobertaConfig,
    T5Config,
    TextToTextConfig,
)
from lmscale.data.draws import streams
from lmscale.errors import DataError
from lmscale.objectives import bart, bert, causal_lm, roberta, t5
from lmscale.objectives.base import Vocabulary
from lmscale.objectives.registry import build_objective
from tests.objectives.rows import lengths_of, make_examples, make_pairs, make_samples, small_vocabulary

CONFIGS = [CausalLMConfig(prefix_lm=True), BertConfig(), RobertaConfig(), BartConfig(), T5Config(), TextToTextConfig()]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_every_objective_is_built_by_its_name(config: object) -> None:
    lengths = lengths_of(config, 64)
    objective = build_objective(config, lengths, small_vocabulary())
    make = {"bert": make_pairs, "text_to_text": make_examples}.get(config.name, make_samples)
    batch = objective.make_batch(make(3, lengths.raw))
    assert batch["tokens"].shape == (3, lengths.encoder)
    assert batch["labels"].shape == batch["loss_mask"].shape == (3, lengths.labels)
    assert any(config.name in names for names in OBJECTIVES_OF.values())


@pytest.mark.parametrize("config", CONFIGS[1:], ids=lambda config: config.name)
def test_a_vocabulary_of_a_size_alone_serves_causal_lm_only(config: object) -> None:
    build_objective(CausalLMConfig(), lengths_of(CausalLMConfig(), 64), Vocabulary(100))
    with pytest.raises(DataError, match=f"which objective {config.name} needs"):
        build_objective(config, lengths_of(config, 64), Vocabulary(100))


def test_no_two_draws_share_a_site() -> None:
    sites = [
        value
        for module in (bart, bert, causal_lm, roberta, t5)
        for name, value in vars(module).items()
        if name.startswith("_") and isinstance(value, int) and value >= 100
    ]
    assert len(sites) == len(set(sites)) >= 20
    keys = np.zeros((1, 4), np.int64)
    assert len({int(streams(keys, site)[0]) for site in sites}) == len(sites)
