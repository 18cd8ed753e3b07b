"""Length of a run, and its checkpoints."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from lmscale.config.base import Section


class TrainConfig(Section):
    """How long to train, and what to do on the way."""

    train_tokens: int = Field(0, ge=0, le=10**18)
    """Tokens to train on; the run ends with the first step that reaches them. Required, but for a task, which may give
    train.epochs."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the training examples of a task, in the place of train_tokens; the last global batch is made whole."""
    stop_at_step: int | None = Field(None, gt=0)
    """End after this step, saved, though the schedules go on to train_tokens: a hard stop that bends nothing."""
    max_minutes: float = Field(0, ge=0)
    """Wall-clock minutes of a start, restarts of `lmscale train` included; after them the step is finished, saved, and the
    run ends with status 75. 0 sets no limit."""
    hang_timeout_s: float = Field(600, ge=0)
    """Seconds that a rank may show no progress within a step, after its first; then the run shows where its ranks are and
    ends with status 76. 0 switches the watchdog off."""
    first_step_timeout_s: float = Field(1800, ge=0)
    """The same for what takes long: building and compiling, loading, the first step, an evaluation, a save. 0 lets them take
    as long as they do."""
    skip_steps: list[int | str] = []
    """Steps that consume their samples without training, one by one or as ranges: ["101-200", 7]. Schedules move on; there is
    no forward, no backward and no update, and the samples are not read."""
    seed: int = Field(1234, ge=0)
    """Seed of the initialization, the sample order and dropout."""
    deterministic: bool = False
    """Ask torch for deterministic kernels, and fail where one does not exist."""
    compile: bool = False
    """Compile the transformer layers with torch.compile; without dropout only. It pays on a GPU, where norms, activations
    and residuals fuse. The losses are those of the uncompiled run but for rounding, on every layout; tensor parallelism,
    ZeRO 3 and recompute: selective cut each layer into several graphs, which leaves less to gain."""
    fused_norms: Literal["auto", "apex", "torch"] = "auto"
    """Whose kernels normalize: NVIDIA's apex or torch. auto: apex's on a GPU where it is installed with them and
    train.compile is off, else torch's. The choice is printed."""
    log_interval: int = Field(10, gt=0)
    """Steps between two lines of metrics."""
    eval_interval: int = Field(1000, ge=0)
    """Steps between two evaluations on the held-out corpora; 0 evaluates at the end only."""
    eval_batches: int = Field(50, gt=0)
    """Global batches of each held-out corpus that an evaluation reads, at most."""

    @field_validator("skip_steps")
    @classmethod
    def _ranges_are_steps(cls, entries: list[int | str]) -> list[int | str]:
        for entry in entries:
            first, last = step_range(entry)
            if not 1 <= first <= last:
                raise ValueError(f"steps count from 1 and ranges go up: {entry!r}")
        return entries

    @property
    def skipped_ranges(self) -> tuple[tuple[int, int], ...]:
        """First and last step of each entry of skip_steps."""
        return tuple(step_range(entry) for entry in self.skip_steps)


def step_range(entry: int | str) -> tuple[int, int]:
    """Read a step ("7") or a range of steps ("101-200", both included).

    Raises:
        ValueError: if it is neither.
    """
    found = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", str(entry))
    if found is None:
        raise ValueError(f"must be steps or ranges like 101-200: {entry!r}")
    return int(found[1]), int(found[2] or found[1])


class CheckpointConfig(Section):
    """When to save and from what to resume."""

    save_interval: int = Field(1000, ge=0)
    """Steps between two checkpoints; 0 saves at the end only."""
    keep: int = Field(3, ge=0)
    """Checkpoints to keep, the newest; 0 keeps all."""
    keep_every_steps: int = Field(0, ge=0)
    """Keep besides, for good, the checkpoints of steps that this divides; 0 keeps none for that."""
    ephemeral_minutes: float = Field(0, ge=0)
    """Minutes after a checkpoint until one is saved that goes when the next is there; 0 saves none of that kind."""
    asynchronous: bool = False
    """Write behind the training loop, which stands for a copy of the state to host memory alone: as much memory again as
    weights and optimizer state take in fp32."""
    on_failure: Literal["continue", "stop"] = "continue"
    """What a save that fails does to the run: it says so and goes on without the checkpoint, or ends. The last save of a
    run must succeed."""
    on_saved: str | None = None
    """A shell command run in the background for each checkpoint, with LMSCALE_CHECKPOINT, LMSCALE_STEP and
    LMSCALE_OUTPUT_DIR: a copy to an object store. A run ends when it has ended. Its failure is logged."""
    resume: str = "auto"
    """auto: from output_dir's newest checkpoint if there is one; never: a new run in a new directory; or a
    checkpoint's path."""
    allow_change: list[Literal["batch", "curriculum", "data", "seed"]] = []
    """What a resumed run may do otherwise than before, from the checkpoint on: batch: batch.global_batch_size, ramp and
    stages; curriculum: data.seq_length_stages; data: data.train, its sources and weights; seed: train.seed, so the order of
    samples and dropout. Samples and tokens are counted on: the next step takes the next sample. A change of data or seed is
    a stage in the manifests of the checkpoints that follow."""
