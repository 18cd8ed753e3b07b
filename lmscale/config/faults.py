"""What a run does when training goes wrong."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmscale.config.base import Section

FaultKind = Literal["non_finite", "loss_spike", "grad_norm_spike", "overflow_storm"]


class FaultPolicy(Section):
    """What is done about one kind of fault."""

    budget: int = Field(10, ge=0)
    """Skips or rewinds for this kind in the whole run; the next fault of the kind then ends it, with exit status 77."""
    steps_before: int = Field(0, ge=0)
    """With action rewind: steps before the offending one that are skipped with it."""


class NonFinitePolicy(FaultPolicy):
    """A loss or a gradient norm that is not finite."""

    action: Literal["skip", "rewind", "stop"] = "skip"
    """skip: the update is withheld on all ranks, its samples count as consumed; rewind: back to the newest checkpoint, and
    from there the run skips the offending step; stop: the run ends with 77, unsaved."""


class SpikePolicy(FaultPolicy):
    """A value far above those of the past good steps: by (value - median) / (1.4826 x median absolute deviation)."""

    action: Literal["none", "skip", "rewind", "stop"] = "none"
    """As of faults.non_finite.action; none: it is told and the update is made."""
    window: int = Field(128, ge=4)
    """Past good steps that the value is compared with."""
    min_steps: int = Field(32, ge=4)
    """Good steps that there must be before any step is judged; at most the window."""
    threshold: float = Field(8.0, gt=0)
    """Robust z-score from which a value is a spike; only values above the median are."""


class GradNormSpikePolicy(SpikePolicy):
    """As of the loss, of the global gradient norm before clipping, which has the longer tail."""

    threshold: float = Field(16.0, gt=0)
    """Robust z-score from which a value is a spike; only values above the median are."""


class OverflowStormPolicy(FaultPolicy):
    """Too many overflow skips of fp16 at once; each by itself is normal, and lowers the loss scale."""

    action: Literal["none", "rewind", "stop"] = "stop"
    """rewind: back to the newest checkpoint, skipping the steps of the storm; stop: the run ends with 77, unsaved; none: it is
    told."""
    overflows: int = Field(20, ge=2)
    """Steps that overflow ..."""
    of_steps: int | None = Field(None, ge=2)
    """... of the last so many; left out, in a row."""

    @property
    def span(self) -> int:
        """Steps that are looked at."""
        return self.of_steps or self.overflows


class FaultsConfig(Section):
    """What is watched between backward and update, on all ranks together; a section that is left out is not watched."""

    non_finite: NonFinitePolicy = NonFinitePolicy()
    """Loss or gradients that are not finite, in any precision; an overflow of fp16 gradients is none."""
    loss_spike: SpikePolicy | None = None
    """A loss far above the past ones."""
    grad_norm_spike: GradNormSpikePolicy | None = None
    """A gradient norm far above the past ones."""
    overflow_storm: OverflowStormPolicy | None = None
    """Too many overflows of fp16 at once."""

    def policies(self) -> dict[FaultKind, NonFinitePolicy | SpikePolicy | OverflowStormPolicy]:
        """List what is watched."""
        found: dict[FaultKind, NonFinitePolicy | SpikePolicy | OverflowStormPolicy] = {"non_finite": self.non_finite}
        if self.loss_spike is not None:
            found["loss_spike"] = self.loss_spike
        if self.grad_norm_spike is not None:
            found["grad_norm_spike"] = self.grad_norm_spike
        if self.overflow_storm is not None:
            found["overflow_storm"] = self.overflow_storm
        return found
