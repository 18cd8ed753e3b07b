"""Names of layouts, and which of them are tried."""

from __future__ import annotations

import pytest

from lmscale.config.layouts import broken_rule
from lmscale.errors import ConfigError
from lmscale.verify.layouts import Candidate, all_layouts, parse_layouts, reference_layout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("max_ranks", [1, 2, 4])
def test_names_are_read_back(max_ranks: int, precision: str) -> None:
    layouts = all_layouts(max_ranks, precision, "none")
    names = [layout.name for layout in layouts]
    assert len(set(names)) == len(names)
    assert parse_layouts(",".join(names), max_ranks, precision) == layouts


def test_every_axis_is_tried_up_to_the_ranks() -> None:
    layouts = all_layouts(4, "fp32", "none")
    sizes = {(layout.tp_size, layout.pp_size, layout.dp_size) for layout in layouts}
    assert sizes == {
        *[(1, 1, 1), (1, 1, 2), (1, 1, 4), (1, 2, 1), (1, 4, 1), (2, 1, 1), (4, 1, 1)],
        *[(2, 2, 1), (2, 1, 2), (1, 2, 2)],
    }
    assert all(broken_rule(layout.legality("fp32")) is None for layout in layouts)
    assert {layout.zero_stage for layout in layouts} == {0, 1, 2, 3}
    assert any(layout.sequence_parallel and layout.is_pipeline for layout in layouts)
    assert any(layout.is_pipeline and layout.pp_size == 1 for layout in layouts)
    assert {layout.num_ranks for layout in layouts if layout.recompute == "full"} == {1, 2}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_reference_recomputes_nothing_and_is_not_tried_again(precision: str, recompute: str) -> None:
    reference = reference_layout(precision, recompute)  # type: ignore[arg-type]
    assert (reference.num_ranks, reference.zero_stage) == (1, 0 if precision == "fp32" else 1)
    layouts = all_layouts(2, precision, recompute)  # type: ignore[arg-type]
    assert reference not in layouts
    single = Candidate(zero_stage=reference.zero_stage)
    assert (single in layouts) == (recompute != "none")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("pp2-zero3", "pipeline with ZeRO 2 or 3 cannot be trained"),
        ("pp1-zero2", "pipeline with ZeRO 2 or 3 cannot be trained"),
        ("sp", "sequence parallelism without tensor parallelism cannot be trained"),
        ("tp2,tp8", "'tp8-zero0': takes 8 ranks; --max-ranks is 4"),
        ("tp2-tp2", "says again"),
        ("tp2-zero4", "'zero4' is no part of a layout's name"),
        ("cp2", "'cp2' is no part of a layout's name"),
        (",", "names no layout"),
    ],
)
def test_a_wrong_layout_is_refused_by_name(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse_layouts(text, 4, "fp32")
    assert str(refusal.value).startswith("--layouts = ")
    assert part in str(refusal.value)


def test_half_precision_starts_at_zero_1() -> None:
    assert [layout.zero_stage for layout in parse_layouts("tp2,pp2", 4, "bf16")] == [1, 1]
    with pytest.raises(ConfigError, match="half precision with ZeRO 0"):
        parse_layouts("tp2-zero0", 4, "bf16")
