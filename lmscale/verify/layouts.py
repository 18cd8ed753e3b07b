"""The layouts that a verification tries, and their names: tp2-sp-pp2-zero1."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from lmscale.config.layouts import Layout, broken_rule
from lmscale.errors import ConfigError

Recompute = Literal["none", "selective", "full"]

GRAMMAR = (
    "parts joined by '-': tpN, ppN (pp1: a pipeline of one stage), dpN, sp, zero0 .. zero3 (left out, the lowest that "
    "can be trained), recompute or norecompute (left out, as in the run)"
)
_SIZE = re.compile(r"^(tp|pp|dp)([1-9]\d*)$")
_ZERO = re.compile(r"^zero([0-3])$")
_WORDS: dict[str, tuple[str, Any]] = {
    "sp": ("sequence_parallel", True),
    "recompute": ("recompute", "full"),
    "norecompute": ("recompute", "none"),
}


@dataclass(frozen=True)
class Candidate:
    """One way to lay a run out over ranks."""

    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    sequence_parallel: bool = False
    zero_stage: int = 0
    recompute: Recompute | None = None
    """None: as the run has it."""
    is_pipeline: bool = False
    """On DeepSpeed's pipeline engine, as every layout with pp_size > 1 is."""

    @property
    def num_ranks(self) -> int:
        """Ranks that it needs."""
        return self.tp_size * self.pp_size * self.dp_size

    @property
    def name(self) -> str:
        """Its name, which `parse_layouts` reads back."""
        parts = [f"tp{self.tp_size}"] if self.tp_size > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"pp{self.pp_size}"] if self.is_pipeline else []
        parts += [f"dp{self.dp_size}"] if self.dp_size > 1 else []
        parts += [f"zero{self.zero_stage}"]
        parts += {None: [], "full": ["recompute"], "none": ["norecompute"], "selective": []}[self.recompute]
        return "-".join(parts)

    def legality(self, precision: str) -> Layout:
        """Describe it to the table of layouts, for which a pipeline is one from two stages on."""
        return Layout(
            zero_stage=self.zero_stage,
            pp_size=max(2, self.pp_size) if self.is_pipeline else 1,
            tp_size=self.tp_size,
            sequence_parallel=self.sequence_parallel,
            precision=precision,
            offload_optimizer=False,
            offload_param=False,
        )


def reference_layout(precision: str, recompute: Recompute) -> Candidate:
    """Return what the others are compared with: one rank, nothing recomputed, the lowest ZeRO stage that trains."""
    return Candidate(zero_stage=_lowest_stage(precision), recompute=None if recompute == "none" else "none")


def all_layouts(max_ranks: int, precision: str, recompute: Recompute) -> list[Candidate]:
    """List every layout that the table allows, on sizes that are powers of two.

    Full recompute, where the run has another, is tried once for each kind of engine.

    Args:
        max_ranks: ranks that a layout may take.
        precision: fp32, bf16 or fp16.
        recompute: the run's.
    """
    lowest = _lowest_stage(precision)
    single = Candidate(zero_stage=lowest)
    plain = [
        candidate
        for candidate in _combinations(max_ranks)
        if broken_rule(candidate.legality(precision)) is None and (candidate != single or recompute != "none")
    ]
    again = (
        single,
        Candidate(dp_size=2, zero_stage=3),
        Candidate(tp_size=2, sequence_parallel=True, zero_stage=lowest),
        Candidate(pp_size=2, zero_stage=lowest, is_pipeline=True),
    )
    if recompute != "full":
        plain += [replace(candidate, recompute="full") for candidate in again if candidate.num_ranks <= max_ranks]
    return sorted(plain, key=lambda candidate: candidate.num_ranks)


def parse_layouts(text: str, max_ranks: int, precision: str) -> list[Candidate]:
    """Read a list of names, as in "tp2,pp2,dp2-zero3".

    Raises:
        ConfigError: if a name is none, needs more than max_ranks, or is a layout that cannot be trained; then the
            message names the rule.
    """
    candidates = [_parse(name, precision) for name in text.replace(" ", "").split(",") if name]
    for candidate in candidates:
        if candidate.num_ranks > max_ranks:
            raise _wrong(candidate.name, f"takes {candidate.num_ranks} ranks", f"--max-ranks is {max_ranks}")
        rule = broken_rule(candidate.legality(precision))
        if rule is not None:
            raise _wrong(candidate.name, f"{rule.name} cannot be trained: {rule.because}", rule.instead)
    if not candidates:
        raise _wrong(text, "names no layout", GRAMMAR)
    return list(dict.fromkeys(candidates))


def _combinations(max_ranks: int) -> Iterator[Candidate]:
    sizes = [2**power for power in range(max_ranks.bit_length())]
    for pp_size, tp_size, dp_size in itertools.product(sizes, repeat=3):
        if pp_size * tp_size * dp_size > max_ranks:
            continue
        for has_sp, stage in itertools.product((False, True), range(4)):
            yield Candidate(tp_size, pp_size, dp_size, has_sp, stage, is_pipeline=pp_size > 1)
    for stage in range(4):
        yield Candidate(zero_stage=stage, is_pipeline=True)


def _lowest_stage(precision: str) -> int:
    return next(s for s in range(4) if broken_rule(Candidate(zero_stage=s).legality(precision)) is None)


def _parse(name: str, precision: str) -> Candidate:
    keys: dict[str, Any] = {}
    for part in name.split("-"):
        size, stage = _SIZE.match(part), _ZERO.match(part)
        if size:
            key, value = f"{size[1]}_size", int(size[2])
        elif stage:
            key, value = "zero_stage", int(stage[1])
        elif part in _WORDS:
            key, value = _WORDS[part]
        else:
            raise _wrong(name, f"{part!r} is no part of a layout's name", GRAMMAR)
        if key in keys:
            raise _wrong(name, f"{part!r} says again what is said before", GRAMMAR)
        keys[key] = value
    keys.setdefault("zero_stage", _lowest_stage(precision))
    return Candidate(**keys, is_pipeline="pp_size" in keys)


def _wrong(name: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError(rule, field="--layouts", value=name, remedy=remedy)
