"""Training runs that others have published, to compare the planner's step times with: docs/planner.md has the table.

What a source does not say is assumed, and named here:

- Megatron-LM on H100 (README and images/model_table.png, 2024): vocabulary 131,072, length 4,096. Not said: the micro batch
  (2 without a pipeline, 1 with one) and the parts of an interleaved stage (one a layer). Data- and tensor-parallel
  communication overlap, as it says: a quarter of the latter is taken to show.
- Megatron-LM on A100 (Narayanan et al. 2021, arXiv:2104.04473, table 1): fp16, vocabulary 51,200, length 2,048, full
  recompute, attention that keeps its scores, no sequence parallelism. Not said: micro batch (4 without a pipeline, 1 with
  one), parts of a stage. Seconds follow from its FLOP/s by its own formula, which counts the recompute.
- GPT-3 175B on 1,024 A100: README of Megatron-LM until 2024 and examples/pretrain_gpt3_175B.sh.
- Korthikanti et al. 2022, arXiv:2205.05198, tables 3 and 5: full recompute, and selective with sequence parallelism;
  stages of 3 parts, but one for the trillion.
- llm-foundry (scripts/train/benchmarking/README.md, 2023): FSDP, which is ZeRO 3; half of its traffic is taken to hide.
- BLOOM (BigScience, train/tr11-176B-ml/chronicles-prequel.md, 2022-02-28): 70 layers and two embeddings in 12 stages of 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.plan.activations import StepShape
from lmscale.plan.device_types import DEVICE_TYPES
from lmscale.plan.flops import model_flops_per_token
from lmscale.plan.stages import PlannedLayer
from lmscale.plan.step_time import StepTime, System, predict_step_seconds


@dataclass(frozen=True)
class PublishedRun:
    """A run, its layout, and the seconds of its step."""

    source: str
    name: str
    device: str
    model: ModelConfig
    step: StepShape
    dp_size: int
    zero_stage: int
    seconds: float
    system: System
    known: str = ""
    """Why the prediction is off by more than the tolerance, where it is."""
    layers_of_stage: int | None = None

    @property
    def num_devices(self) -> int:
        """Devices of the run."""
        return self.step.tp_size * self.step.pp_size * self.dp_size

    def predict(self) -> StepTime:
        """Predict its step."""
        stage = [PlannedLayer("layer")] * (self.layers_of_stage or 0)
        return predict_step_seconds(
            self.model,
            self.step,
            DEVICE_TYPES[self.device],
            dp_size=self.dp_size,
            zero_stage=self.zero_stage,
            system=self.system,
            slowest=stage or None,
        )

    @property
    def error(self) -> float:
        """Predicted over published seconds, less 1."""
        return self.predict().total / self.seconds - 1


def published_runs() -> list[PublishedRun]:
    """List every run, in the order of the table."""
    return [*_megatron_h100(), *_foundry(), *_megatron_a100(), *_korthikanti(), *_bloom()]


def _gpt(layers: int, hidden: int, heads: int, vocab: int, length: int) -> ModelConfig:
    return ModelConfig(
        num_layers=layers,
        hidden_size=hidden,
        num_attention_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=length,
    )


def _step(length: int, micro: int, repeats: int, tp_size: int = 1, pp_size: int = 1) -> StepShape:
    return StepShape(SampleLengths(length + 1, length, 0, length), micro, repeats, tp_size, pp_size)


_TFLOPS = 1.0e12
_H100 = (
    ("1.7B", 16, 2048, 24, 1, 1, 192, 408.8),
    ("7.1B", 32, 4096, 30, 2, 1, 192, 465.9),
    ("16B", 48, 6144, 32, 4, 1, 192, 489.1),
    ("32B", 56, 7168, 48, 8, 1, 192, 459.6),
    ("70B", 64, 8192, 84, 8, 2, 384, 419.7),
    ("119B", 80, 10240, 92, 8, 4, 768, 420.5),
    ("177B", 96, 12288, 96, 8, 6, 1152, 432.8),
    ("314B", 128, 16384, 96, 8, 8, 1536, 474.4),
    ("462B", 144, 18432, 112, 8, 16, 3072, 459.9),
)
"""Name, heads, hidden, layers, tensor, pipeline, batch, model TFLOP/s of a device; 48 data-parallel ranks each."""


def _megatron_h100() -> Iterator[PublishedRun]:
    length, dp_size = 4096, 48
    for name, heads, hidden, layers, tp_size, pp_size, batch, rate in _H100:
        model = _gpt(layers, hidden, heads, 131_072, length)
        micro = 2 if pp_size == 1 else 1
        step = _step(length, micro, batch // dp_size // micro, tp_size, pp_size)
        flops = model_flops_per_token(model, length) * length * batch
        seconds = flops / (rate * _TFLOPS * dp_size * tp_size * pp_size)
        parts = layers // pp_size if pp_size > 1 else 1
        system = System(0.75, 0.75, 1.0, 1.0, parts, scatters_gradients=True)
        step = replace(step, sequence_parallel=tp_size > 1)
        yield PublishedRun("Megatron-LM", name, "H100", model, step, dp_size, 1, seconds, system)


_SIZES = {
    "125m": (12, 768, 12),
    "350m": (24, 1024, 16),
    "760m": (24, 1536, 12),
    "1b": (24, 2048, 16),
    "3b": (32, 2560, 20),
    "7b": (32, 4096, 32),
    "13b": (40, 5120, 40),
    "30b": (48, 7168, 56),
    "70b": (80, 8192, 64),
}
_SLOW = "the source's own 16 devices are 9 % faster a device than these 8"
_FOUNDRY = (
    ("760m", "H100", 8, 24, 2, 63147, _SLOW),
    ("760m", "H100", 16, 24, 1, 68551, ""),
    ("1b", "H100", 8, 14, 1, 45455, ""),
    ("1b", "H100", 64, 20, 1, 44402, ""),
    ("3b", "H100", 16, 10, 3, 24142, ""),
    ("3b", "H100", 64, 6, 3, 22525, ""),
    ("7b", "H100", 8, 6, 1, 10643, ""),
    ("13b", "H100", 8, 2, 1, 4792, ""),
    ("13b", "H100", 64, 2, 1, 4800, ""),
    ("30b", "H100", 8, 3, 21, 2002, ""),
    ("30b", "H100", 32, 14, 3, 2308, ""),
    ("70b", "H100", 64, 8, 4, 1039, ""),
    ("125m", "A100-80", 8, 40, 2, 142830, ""),
    ("350m", "A100-80", 8, 32, 2, 58782, ""),
    ("760m", "A100-80", 8, 24, 2, 32434, ""),
    ("1b", "A100-80", 8, 14, 4, 20513, ""),
    ("3b", "A100-80", 8, 10, 2, 10811, ""),
    ("7b", "A100-80", 8, 6, 2, 4641, ""),
    ("13b", "A100-80", 8, 2, 3, 2262, ""),
    ("30b", "A100-80", 8, 3, 21, 916, ""),
    ("70b", "A100-80", 64, 8, 4, 410, ""),
)
"""Name, device, devices, micro batch, micro batches, tokens a second of a device; 30b and 70b recompute in full."""


def _foundry() -> Iterator[PublishedRun]:
    length = 2048
    for name, device, dp_size, micro, repeats, tokens, known in _FOUNDRY:
        model = _gpt(*_SIZES[name], 50_368, length)
        recompute = "full" if name in ("30b", "70b") else "none"
        step = replace(_step(length, micro, repeats), recompute=recompute)
        system = System(hidden_data=0.5)
        seconds = micro * repeats * length / tokens
        yield PublishedRun("llm-foundry", name, device, model, step, dp_size, 3, seconds, system, known)


_A100 = (
    ("1.7B", 2304, 24, 24, 1, 1, 32, 512, 137.0, 1),
    ("3.6B", 3072, 30, 32, 2, 1, 64, 512, 138.0, 1),
    ("7.5B", 4096, 36, 32, 4, 1, 128, 512, 142.0, 1),
    ("18B", 6144, 40, 48, 8, 1, 256, 1024, 135.0, 1),
    ("39B", 8192, 48, 64, 8, 2, 512, 1536, 138.0, 2),
    ("76B", 10240, 60, 80, 8, 4, 1024, 1792, 140.0, 3),
    ("145B", 12288, 80, 96, 8, 8, 1536, 2304, 148.0, 2),
    ("310B", 16384, 96, 128, 8, 16, 1920, 2160, 155.0, 2),
    ("530B", 20480, 105, 128, 8, 35, 2520, 2520, 163.0, 3),
    ("1T", 25600, 128, 160, 8, 64, 3072, 3072, 163.0, 1),
)
"""Name, hidden, layers, heads, tensor, pipeline, devices, batch, TFLOP/s of a device with recompute, parts of a stage."""


def _megatron_a100() -> Iterator[PublishedRun]:
    length, vocab = 2048, 51_200
    for name, hidden, layers, heads, tp_size, pp_size, devices, batch, rate, parts in _A100:
        dp_size, micro = devices // (tp_size * pp_size), 1 if pp_size > 1 else 4
        step = _unfused(_step(length, micro, batch // dp_size // micro, tp_size, pp_size), "full")
        factor = 1 + length / (6 * hidden) + vocab / (16 * layers * hidden)
        seconds = 96 * batch * length * layers * hidden**2 * factor / (rate * _TFLOPS * devices)
        system = System(0.0, 0.0, interleaving=parts, scatters_sends=True)
        model = _gpt(layers, hidden, heads, vocab, length)
        yield PublishedRun("Megatron-LM", name, "A100-80", model, step, dp_size, 0, seconds, system)
    step = _unfused(_step(length, 1, 192, 8, 16), "full")
    model = _gpt(96, 12288, 96, vocab, length)
    yield PublishedRun("Megatron-LM", "GPT-3 175B", "A100-80", model, step, 8, 0, 32.0, System(0.0, 0.0))


def _unfused(step: StepShape, recompute: str) -> StepShape:
    splits = recompute == "selective"
    return replace(step, precision="fp16", recompute=recompute, sequence_parallel=splits, kernel_keeps_scores=True)


_KORTHIKANTI = (
    ("22B", 6144, 48, 64, 1, 4, 4, 1, 1.42, 1.10),
    ("175B", 12288, 96, 96, 8, 64, 1, 3, 18.13, 13.75),
    ("530B", 20480, 105, 128, 35, 280, 1, 3, 49.05, 37.83),
    ("1T", 25600, 128, 160, 64, 512, 1, 1, 94.42, 71.49),
)
"""Name, hidden, layers, heads, pipeline, batch, micro batch, parts, seconds with full and with selective recompute."""


def _korthikanti() -> Iterator[PublishedRun]:
    length = 2048
    for name, hidden, layers, heads, pp_size, batch, micro, parts, full, selective in _KORTHIKANTI:
        model = _gpt(layers, hidden, heads, 51_200, length)
        system = System(interleaving=parts, scatters_sends=True)
        for recompute, seconds in (("full", full), ("selective", selective)):
            step = _unfused(_step(length, micro, batch // micro, 8, pp_size), recompute)
            label = f"{name}, {recompute} recompute"
            yield PublishedRun("Korthikanti", label, "A100-80", model, step, 1, 0, seconds, system)


def _bloom() -> Iterator[PublishedRun]:
    step = replace(_unfused(_step(2048, 2, 128, 4, 12), "full"), precision="bf16")
    model = _gpt(70, 14336, 112, 250_880, 2048)
    yield PublishedRun("BLOOM", "176B", "A100-80", model, step, 8, 1, 104.50, System(), "", 6)
    known = "second step of a trial; the source's other trials with 8 tensor-parallel ranks vary by 15 %"
    step, model = replace(step, tp_size=8, num_micro_batches=256), _gpt(70, 14336, 64, 250_880, 2048)
    yield PublishedRun("BLOOM", "176B, trial", "A100-80", model, step, 4, 1, 121.63, System(), known, 6)
