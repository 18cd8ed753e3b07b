"""The table of layouts: each rule is reachable, and what it proposes is legal."""

from dataclasses import replace

import pytest

from lmscale.config.layouts import RULES, Layout, broken_rule, check_layout, legal_table
from lmscale.errors import ConfigError

SOUND = Layout(
    zero_stage=1,
    pp_size=1,
    tp_size=1,
    sequence_parallel=False,
    precision="bf16",
    offload_optimizer=False,
    offload_param=False,
)
CASES = {
    "pipeline with ZeRO 2 or 3": (
        replace(SOUND, pp_size=2, zero_stage=3),
        [replace(SOUND, pp_size=2), replace(SOUND, zero_stage=3)],
    ),
    "half precision with ZeRO 0": (
        replace(SOUND, zero_stage=0),
        [SOUND, replace(SOUND, zero_stage=0, precision="fp32")],
    ),
    "sequence parallelism without tensor parallelism": (
        replace(SOUND, sequence_parallel=True),
        [replace(SOUND, sequence_parallel=True, tp_size=2), SOUND],
    ),
    "optimizer offload with ZeRO 0": (
        replace(SOUND, zero_stage=0, precision="fp32", offload_optimizer=True),
        [replace(SOUND, zero_stage=stage, offload_optimizer=True) for stage in (1, 2, 3)],
    ),
    "parameter offload below ZeRO 3": (
        replace(SOUND, zero_stage=2, offload_param=True),
        [replace(SOUND, zero_stage=3, offload_param=True), replace(SOUND, zero_stage=2, offload_optimizer=True)],
    ),
    "optimizer offload with adafactor or muon": (
        replace(SOUND, offload_optimizer=True, optimizer="muon"),
        [
            replace(SOUND, optimizer="muon"),
            *(replace(SOUND, offload_optimizer=True, optimizer=name) for name in ("adamw", "adam", "sgd", "lion")),
        ],
    ),
}


def test_every_rule_has_a_case():
    assert {rule.name for rule in RULES} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rule_is_reached_and_its_remedies_are_legal(name):
    broken, remedies = CASES[name]
    rule = broken_rule(broken)
    assert rule is not None
    assert rule.name == name
    with pytest.raises(ConfigError) as caught:
        check_layout(broken)
    assert name in str(caught.value)
    assert rule.instead in str(caught.value)
    for remedy in remedies:
        check_layout(remedy)


def test_table_says_what_the_rules_say():
    rows = {row["ZeRO"]: row for row in legal_table()}
    assert [rows[stage]["bf16"] for stage in "0123"] == ["no", "yes", "yes", "yes"]
    assert [rows[stage]["fp32 PP"] for stage in "0123"] == ["yes", "yes", "no", "no"]
    assert [rows[stage]["param offload"] for stage in "0123"] == ["no", "no", "no", "yes"]
