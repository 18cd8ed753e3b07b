"""How far a run is: the only counters."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from lmscale.train.faults import FaultLog


@dataclass(frozen=True)
class Progress:
    """Counts at the end of a step.

    A skipped step consumes its data, so the schedules move on; only the optimizer's own count stays. Steps are skipped for
    an fp16 overflow, by the fault policy and by train.skip_steps.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0
    faults: FaultLog = field(default_factory=FaultLog)
    """What the fault policy remembers."""

    def __post_init__(self) -> None:
        """Take the faults as a manifest has them, too; one of before there was a policy has none."""
        if isinstance(self.faults, dict):
            object.__setattr__(self, "faults", FaultLog.from_json(self.faults))

    def after_step(self, samples: int, tokens: int, is_skipped: bool, faults: FaultLog | None = None) -> Progress:
        """Return the progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + int(is_skipped),
            faults=self.faults if faults is None else faults,
        )
