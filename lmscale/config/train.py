"""Length of a run, its checkpoints and what watches it."""

from __future__ import annotations

from pydantic import Field

from lmscale.config.base import Section


class TrainConfig(Section):
    """How long to train, and what to do on the way."""

    train_tokens: int = Field(gt=0)
    """Tokens to train on; the run ends with the first step that reaches them."""
    stop_at_step: int | None = Field(None, gt=0)
    """End after this step, saved, though the schedules go on to train_tokens: a hard stop that bends nothing."""
    seed: int = Field(1234, ge=0)
    """Seed of the initialization, the sample order and dropout."""
    deterministic: bool = False
    """Ask torch for deterministic kernels, and fail where one does not exist."""
    compile: bool = False
    """Compile the transformer layers with torch.compile; without dropout only. It pays on a GPU, where norms, activations
    and residuals fuse. The losses are those of the uncompiled run but for rounding, on every layout; tensor parallelism,
    ZeRO 3 and recompute: selective cut each layer into several graphs, which leaves less to gain."""
    log_interval: int = Field(10, gt=0)
    """Steps between two lines of metrics."""
    eval_interval: int = Field(1000, ge=0)
    """Steps between two evaluations on the held-out corpora; 0 evaluates at the end only."""
    eval_batches: int = Field(50, gt=0)
    """Global batches of each held-out corpus that an evaluation reads, at most."""


class CheckpointConfig(Section):
    """When to save and from what to resume."""

    save_interval: int = Field(1000, ge=0)
    """Steps between two checkpoints; 0 saves at the end only."""
    keep: int = Field(3, ge=0)
    """Checkpoints to keep, the newest; 0 keeps all."""
    resume: str = "auto"
    """auto: from output_dir's newest checkpoint if there is one; never: a new run in a new directory; or a
    checkpoint's path."""


class MonitorConfig(Section):
    """Where metrics go, besides metrics.jsonl and the console."""

    tensorboard: bool = True
    """Write TensorBoard events to output_dir/tensorboard."""
    wandb: bool = False
    """Write the same tags to Weights & Biases (needs lmscale[wandb])."""
    megatron_names: bool = False
    """Also write the tags that Megatron-DeepSpeed's dashboards read."""
    device_flops_per_second: float | None = Field(None, gt=0)
    """Peak of one device in the run's precision, for perf/mfu_fraction; left out, taken from the device's name, and
    where that is not known, no MFU is written."""
