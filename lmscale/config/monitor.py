"""What is told of a run, and where."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lmscale.config.base import Section


class SamplesConfig(Section):
    """Texts that the model writes while it trains."""

    prompts: list[str] = Field(min_length=1)
    """Beginnings of texts; each is continued at every evaluation."""
    max_new_tokens: int = Field(32, gt=0)
    """Tokens that are added to each, at most; each of them takes a pass over the whole text."""
    temperature: float = Field(0.0, ge=0)
    """0 takes the likeliest token each time; above it, tokens are drawn, by train.seed and the step."""


class TraceConfig(Section):
    """Which steps are recorded, on which ranks. Recording slows them, and takes some megabytes a step and rank."""

    start_step: int = Field(gt=0)
    """The first step that is recorded. The first steps of a process warm up: take a later one."""
    num_steps: int = Field(3, gt=0)
    """Steps that are recorded, one after another."""
    ranks: list[Annotated[int, Field(ge=0)]] = [0]
    """Ranks that record, each into a file of its own in output_dir/traces."""


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
    alert_command: str | None = None
    """A shell command, run in the background on rank 0 when a fault is acted upon, a rank hangs or the run fails. It finds
    LMSCALE_EVENT (fault, hang, restart, failure), LMSCALE_MESSAGE, LMSCALE_STEP and LMSCALE_OUTPUT_DIR in its environment;
    what it prints goes to logs/alert.log. Its failure or slowness never harms the run."""
    histogram_interval: int = Field(0, ge=0)
    """Steps between two histograms of every weight and of Adam's first moments, in TensorBoard and W&B; 0 writes none."""
    samples: SamplesConfig | None = None
    """Texts that the model continues at each evaluation; gpt only."""
    step_times: bool = False
    """Measure on every rank what a step takes, and how much of that the rank waits for others: perf/own_time_... in the
    metrics, a table of all ranks at the end and in step_times.json, and the pipeline's bubble."""
    trace: TraceConfig | None = None
    """Steps whose operators are recorded, as a timeline for Perfetto or Chrome."""
    prometheus_port: int | None = Field(None, ge=1, le=65535)
    """Serve the newest metrics of rank 0 on this port, for Prometheus (needs lmscale[prometheus])."""
    prometheus_host: str = "127.0.0.1"
    """The address that the port is opened on; 0.0.0.0 lets every machine read the metrics."""
