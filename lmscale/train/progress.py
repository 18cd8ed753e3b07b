"""How far a run is: the only counters."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """Counts at the end of a step.

    A skipped step (fp16 overflow) consumes its data, so the schedules move on; only the optimizer's own count stays.
    """

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0
    skipped_steps: int = 0

    def after_step(self, samples: int, tokens: int, is_skipped: bool) -> Progress:
        """Return the progress after one more step."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            consumed_tokens=self.consumed_tokens + tokens,
            skipped_steps=self.skipped_steps + int(is_skipped),
        )
