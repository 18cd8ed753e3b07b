"""Which layouts DeepSpeed trains: one table, checked before any rank starts, printed by `lmscale doctor --layouts`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lmscale.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """What decides whether a combination is legal; everything else is free."""

    zero_stage: int
    pp_size: int
    tp_size: int
    sequence_parallel: bool
    precision: str
    offload_optimizer: bool
    offload_param: bool
    optimizer: str = "adamw"


@dataclass(frozen=True)
class LayoutRule:
    """A combination that cannot be trained, why, and the nearest one that can."""

    name: str
    forbids: Callable[[Layout], bool]
    because: str
    instead: str


RULES: tuple[LayoutRule, ...] = (
    LayoutRule(
        "pipeline with ZeRO 2 or 3",
        lambda l: l.pp_size > 1 and l.zero_stage >= 2,
        "DeepSpeed cannot partition gradients (ZeRO 2, 3) that a pipeline makes micro batch by micro batch",
        "use ZeRO 1 with the pipeline, or parallel.pp_size = 1",
    ),
    LayoutRule(
        "half precision with ZeRO 0",
        lambda l: l.zero_stage == 0 and l.precision != "fp32",
        "DeepSpeed's ZeRO 0 keeps no fp32 gradients and takes a wrong first step in half precision",
        "use ZeRO 1, which costs nothing on one rank, or precision: fp32",
    ),
    LayoutRule(
        "sequence parallelism without tensor parallelism",
        lambda l: l.sequence_parallel and l.tp_size == 1,
        "sequence parallelism splits the sequence over the tensor-parallel ranks",
        "set parallel.tp_size above 1, or parallel.sequence_parallel = false",
    ),
    LayoutRule(
        "optimizer offload with ZeRO 0",
        lambda l: l.offload_optimizer and l.zero_stage == 0,
        "offload_optimizer moves ZeRO's partitions",
        "use ZeRO 1, 2 or 3",
    ),
    LayoutRule(
        "parameter offload below ZeRO 3",
        lambda l: l.offload_param and l.zero_stage != 3,
        "offload_param moves the partitioned parameters that ZeRO 3 alone has",
        "use ZeRO 3, or offload_optimizer only",
    ),
    LayoutRule(
        "optimizer offload with adafactor or muon",
        lambda l: l.offload_optimizer and l.optimizer in ("adafactor", "muon"),
        "they look at whole matrices, whose parts the ranks would have to exchange from host memory",
        "use optim.name = adamw, adam, sgd or lion, or no offload_optimizer",
    ),
)


def broken_rule(layout: Layout) -> LayoutRule | None:
    """Return the first rule that a layout breaks, or None where it is legal."""
    return next((rule for rule in RULES if rule.forbids(layout)), None)


def check_layout(layout: Layout) -> None:
    """Refuse a layout that cannot be trained.

    Raises:
        ConfigError: naming the reason and the nearest legal layout.
    """
    rule = broken_rule(layout)
    if rule is not None:
        raise ConfigError(f"{rule.name} cannot be trained: {rule.because}", field="layout", remedy=rule.instead)


def legal_table() -> list[dict[str, str]]:
    """Tabulate the legality of every ZeRO stage by precision, pipeline (PP) and offload, from the rules above."""
    rows = []
    for stage in range(4):
        row = {"ZeRO": str(stage)}
        for precision in ("fp32", "bf16", "fp16"):
            for pp_size, label in ((1, ""), (2, " PP")):
                row[precision + label] = _verdict(stage, pp_size, precision, False, False)
        row["opt. offload"] = _verdict(stage, 1, "fp32" if stage == 0 else "bf16", True, False)
        row["param offload"] = _verdict(stage, 1, "fp32" if stage == 0 else "bf16", False, True)
        rows.append(row)
    return rows


def _verdict(stage: int, pp_size: int, precision: str, offload_optimizer: bool, offload_param: bool) -> str:
    layout = Layout(stage, pp_size, 1, False, precision, offload_optimizer, offload_param)
    return "no" if broken_rule(layout) else "yes"
