"""A whole run: the sections of its YAML."""

from __future__ import annotations

from typing import Any, Literal

from lmscale.config.adapt import AdaptConfig, prompt_length
from lmscale.config.base import Section
from lmscale.config.data import DataConfig, TokenizerConfig
from lmscale.config.faults import FaultsConfig
from lmscale.config.lengths import SampleLengths, behind_prompt, sample_lengths, task_lengths
from lmscale.config.model import ModelConfig
from lmscale.config.monitor import MonitorConfig
from lmscale.config.objective import CausalLMConfig, ObjectiveConfig
from lmscale.config.optim import BatchConfig, LossScaleConfig, OptimConfig
from lmscale.config.parallel import ParallelConfig
from lmscale.config.task import TaskConfig
from lmscale.config.train import CheckpointConfig, TrainConfig


class RunConfig(Section):
    """Everything that a run is made of; `config.yaml` in its directory holds it resolved."""

    model: ModelConfig
    """The architecture."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer that made the corpora; needed to generate text from the checkpoint."""
    data: DataConfig
    """Corpora and samples."""
    objective: ObjectiveConfig = CausalLMConfig()
    """What the model is trained to predict; left out, its architecture's own objective."""
    task: TaskConfig | None = None
    """A task to adapt to, with files of its own in the place of corpora."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout over the ranks."""
    precision: Literal["fp16", "bf16", "fp32"] = "fp32"
    """Arithmetic of forward and backward; master weights and optimizer state are fp32 in every case."""
    loss_scale: LossScaleConfig | None = None
    """Dynamic loss scaling, with precision: fp16 only; left out there, its defaults."""
    batch: BatchConfig
    """Batch sizes."""
    optim: OptimConfig
    """Optimizer and schedule."""
    train: TrainConfig
    """Length, seed, intervals."""
    adapt: AdaptConfig | None = None
    """How model.init_from's weights are adapted; left out, everything is trained from the start."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving and resuming."""
    faults: FaultsConfig = FaultsConfig()
    """What is done when training goes wrong."""
    monitor: MonitorConfig = MonitorConfig()
    """Where metrics go."""
    deepspeed: str | dict[str, Any] = {"zero_optimization": {"stage": 1}}
    """A DeepSpeed JSON file (ds_configs/) or the same keys here: ZeRO stage, offload, communication."""
    output_dir: str
    """The run's directory."""

    @property
    def lengths(self) -> SampleLengths:
        """Lengths of the samples as the model sees them, a trained prompt included."""
        if self.task is not None:
            writes = self.task.output_of(self.model.architecture) == "text"  # with a head there is no decoder
            return task_lengths(self.data, self.model.has_decoder_stack and writes)
        return behind_prompt(self.text_lengths, prompt_length(self.adapt), self.objective)

    @property
    def text_lengths(self) -> SampleLengths:
        """Lengths of the samples as objectives make them: what a trained prompt leaves of data.seq_length."""
        length = self.data.seq_length - prompt_length(self.adapt)
        return sample_lengths(self.data.model_copy(update={"seq_length": length}), self.objective)


class ZeroChoice(Section):
    """What the DeepSpeed JSON decides about the layout."""

    stage: int = 0
    """ZeRO stage."""
    offload_optimizer: bool = False
    """Optimizer state in host memory."""
    offload_param: bool = False
    """Parameters in host memory."""
    reduce_bucket: int = 500_000_000
    """Elements of the bucket that gradients are reduced in."""
    live_parameters: int = 1_000_000_000
    """Most elements of gathered parameters under ZeRO 3."""
