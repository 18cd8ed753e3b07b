"""Seconds of a training step, from the work of one device and what it waits for.

    step = m beat + (p - 1) beat / v + data + optimizer

with m micro batches, p stages, v parts of a stage that take turns (interleaving: 1 in this stack). The beat is what a
micro batch takes on the slowest stage, forward and backward, the sum of:

    matmul    2 M N K / rate + e (M K + K N + M N) / memory for each product, forward and twice backward: operands are
              read and results written beside the arithmetic, so small matrices reach less of the peak
    core      attention's two products: where scores are kept, the whole square at the same rate; a fused kernel
              computes half of a causal square at FUSED_RATE of it, 2.5 times as much backward as forward
    memory    bytes that element-wise kernels read and write: norms, dropout, residuals, activation, copies of heads,
              scores that are kept, logits, and the sum of gradients over micro batches
    tensor    a layer's collectives; half of those backward run under products
    pipeline  hidden states to the next stage, gradients back

with rate = matmul_fraction x peak, memory = MEMORY_FRACTION x bandwidth, links LINK_FRACTION x bandwidth. Recompute adds
forward's share again. data is the gradients' and parameters' exchange, which this stack does not hide; a group that has k
ranks in each node sends by k network cards. The optimizer reads and writes its state once; offloaded, over the host's link.

matmul_fraction alone is calibrated, one number for a type of device; docs/planner.md compares with published runs.

Source: Narayanan et al. 2021, arXiv:2104.04473, sec. 2.2 (bubble); Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from lmscale.config.model import ModelConfig
from lmscale.errors import ConfigError
from lmscale.plan.activations import StepShape
from lmscale.plan.communication import Traffic, step_traffic
from lmscale.plan.device_types import DeviceType
from lmscale.plan.stages import PlannedLayer, layer_parameters, stage_layers, stage_parameters

MEMORY_FRACTION = 0.8
"""Share of the memory's bandwidth that element-wise kernels reach."""
LINK_FRACTION = 0.75
"""Share of the links' bandwidth that collectives of many megabytes reach."""
FUSED_RATE = 0.5
"""What a fused attention kernel reaches of a matrix multiplication's rate."""
UPDATE_BYTES = 28
"""Bytes that an update reads and writes for each parameter beside its moments, which are read and written once."""


@dataclass(frozen=True)
class System:
    """What the software hides or saves; the defaults are this stack's, others are for published runs of others."""

    hidden_forward: float = 0.0
    """Share of tensor-parallel communication forward that runs under computation."""
    hidden_backward: float = 0.5
    """The same, backward."""
    hidden_pipeline: float = 0.0
    """The same, from stage to stage."""
    hidden_data: float = 0.0
    """Share of the data-parallel exchange that may run under computation, as far as there is some."""
    interleaving: int = 1
    """Parts of a stage that take turns."""
    scatters_sends: bool = False
    """Each tensor-parallel rank sends its part of the hidden states to the next stage, which gathers them."""
    scatters_gradients: bool = False
    """Gradients are reduce-scattered where this stack reduces them whole."""


OURS = System()


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by what they are spent on, on the slowest stage."""

    matmul: float
    core: float
    memory: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    @property
    def beat(self) -> float:
        """Seconds of all micro batches on the slowest stage."""
        return self.matmul + self.core + self.memory + self.tensor + self.pipeline


@dataclass
class _Work:
    """Seconds of a micro batch on a stage."""

    matmul: float = 0.0
    core: float = 0.0
    memory: float = 0.0

    def add(self, other: _Work, times: int) -> None:
        self.matmul += times * other.matmul
        self.core += times * other.core
        self.memory += times * other.memory

    @property
    def total(self) -> float:
        return self.matmul + self.core + self.memory


def predict_step_seconds(
    model: ModelConfig,
    step: StepShape,
    device: DeviceType,
    *,
    dp_size: int,
    zero_stage: int,
    moment_width: float = 8,
    offload_optimizer: bool = False,
    offload_param: bool = False,
    system: System = OURS,
    slowest: Sequence[PlannedLayer] | None = None,
) -> StepTime:
    """Predict the seconds of a training step.

    Args:
        model: the architecture.
        step: lengths, batch and layout.
        device: all ranks run on one such each, neighbours in a node.
        dp_size: data-parallel ranks.
        zero_stage: ZeRO stage.
        moment_width: bytes of the optimizer's moments for each parameter.
        offload_optimizer: they are in host memory.
        offload_param: so are ZeRO 3's parameters.
        system: what the software hides.
        slowest: the layers of the slowest stage, where they are divided otherwise than here.

    Raises:
        ConfigError: if the device does not compute in the precision, or the layers do not divide over the stages.
    """
    costs = _Costs(model, step, device)
    if slowest is not None:
        works, stage = [costs.stage(slowest)], 0
        parameters = sum(layer_parameters(model, layer, step.tp_size) for layer in slowest)
        traffic_model = model.model_copy(update={"num_layers": len(slowest) * step.pp_size})
    else:
        works = [costs.stage(layers) for layers in stage_layers(model, step.pp_size)]
        stage = max(range(step.pp_size), key=lambda index: works[index].total)
        parameters = stage_parameters(model, step.tp_size, step.pp_size)[stage]
        traffic_model = model
    work, repeats = works[stage], step.num_micro_batches
    if repeats > 1:
        work.memory += costs.sum_seconds(parameters)
    # The middle of a pipeline sends both ways, its ends one way; the beat is that of the slowest in either.
    seen = min(max(stage, 1), step.pp_size - 2) if step.pp_size > 2 else stage
    traffic = step_traffic(
        traffic_model, step, dp_size=dp_size, zero_stage=zero_stage, stage=seen, num_parameters=parameters
    )
    seconds = exposed_seconds(traffic, step, device, dp_size, work.total, system)
    shard = parameters / dp_size if zero_stage else parameters
    optimizer = costs.update_seconds(shard, moment_width, offload_optimizer)
    if offload_param:
        optimizer += (2 * repeats + 1) * shard * step.width / device.host_bytes_per_second
    computed = StepTime(
        matmul=work.matmul * repeats,
        core=work.core * repeats,
        memory=work.memory * repeats,
        tensor=seconds["tensor"],
        pipeline=seconds["pipeline"],
        bubble=0.0,
        data=seconds["data"],
        optimizer=optimizer,
    )
    bubble = (step.pp_size - 1) / system.interleaving * computed.beat / repeats
    return replace(computed, bubble=bubble)


def exposed_seconds(
    traffic: list[Traffic], step: StepShape, device: DeviceType, dp_size: int, computing: float, system: System = OURS
) -> dict[str, float]:
    """Compute what a rank waits for its messages in a step, by axis.

    Args:
        traffic: as `plan.communication.step_traffic` lists it.
        step: batch and layout.
        device: its links.
        dp_size: data-parallel ranks.
        computing: seconds of a micro batch's computation, under which the data axis may hide.
        system: what the software hides.
    """
    totals = {"tensor": 0.0, "pipeline": 0.0, "data": 0.0}
    rates = {axis: LINK_FRACTION * rate for axis, rate in link_rates(step, device, dp_size).items()}
    shown = {"forward": 1 - system.hidden_forward, "backward": 1 - system.hidden_backward}
    for message in traffic:
        seconds = message.wire_bytes / rates[message.axis]
        if message.axis == "tensor":
            seconds *= shown.get(message.what, 1.0)
        elif message.axis == "data" and message.collective == "all_reduce" and system.scatters_gradients:
            seconds /= 2
        elif message.collective == "send":
            split = step.tp_size if system.scatters_sends and not step.sequence_parallel else 1
            seconds *= (1 - system.hidden_pipeline) * system.interleaving / split
        totals[message.axis] += seconds
    has_many = any(message.collective == "reduce_scatter" and message.axis == "data" for message in traffic)
    cover = computing * (step.num_micro_batches if has_many else 1)
    totals["data"] -= min(system.hidden_data * totals["data"], cover)
    return totals


def link_rates(step: StepShape, device: DeviceType, dp_size: int) -> dict[str, float]:
    """Return the bytes a second between the ranks of each axis: tensor-parallel ranks are neighbours, then data-parallel."""
    inside, outside, size = device.node_bytes_per_second, device.network_bytes_per_second, device.devices_per_node
    tensor, data = step.tp_size, step.tp_size * dp_size
    members = max(1, size // tensor)
    return {
        "tensor": inside if tensor <= size else outside,
        "data": inside if data <= size else min(inside, members * outside),
        "pipeline": inside if data * step.pp_size <= size else outside,
    }


class _Costs:
    """What layers cost on a device: seconds of a micro batch, forward, backward and what is computed again."""

    def __init__(self, model: ModelConfig, step: StepShape, device: DeviceType):
        peak: float | None = device.flops_per_second.get(step.precision)  # type: ignore[call-overload]
        if peak is None:
            names = ", ".join(device.flops_per_second)
            raise ConfigError(
                f"{device.name} computes in {names} only",
                field="precision",
                value=step.precision,
                remedy="choose one of these, as in precision=fp16",
            )
        self.model, self.step, self.device = model, step, device
        self.rate = peak * device.matmul_fraction
        self.memory = device.memory_bytes_per_second * MEMORY_FRACTION
        self._known: dict[tuple[str, bool], _Work] = {}

    def stage(self, layers: Sequence[PlannedLayer]) -> _Work:
        """Sum what the layers of a stage cost."""
        total = _Work()
        for layer, number in Counter(layers).items():
            key = (layer.kind, layer.in_decoder)
            if key not in self._known:
                self._known[key] = self._layer(layer)
            total.add(self._known[key], number)
        return total

    def sum_seconds(self, num_parameters: int) -> float:
        """Add a micro batch's gradients to those before it: each read, the sum read and written."""
        summed = 2 if self.step.precision == "fp16" else 4
        return num_parameters * (self.step.width + 2 * summed) / self.memory

    def update_seconds(self, num_parameters: float, moment_width: float, is_offloaded: bool) -> float:
        """Update parameters; a CPU does it at the rate of the host's link, gradients and parameters cross it."""
        num_bytes = UPDATE_BYTES + 2 * moment_width
        if is_offloaded:
            return num_parameters * (num_bytes + 4 + self.step.width) / self.device.host_bytes_per_second
        return num_parameters * num_bytes / self.memory

    def _layer(self, layer: PlannedLayer) -> _Work:
        step, model = self.step, self.model
        own = step.lengths.decoder if layer.in_decoder else step.lengths.encoder
        if layer.kind in ("layer", "fed_layer"):
            return self._transformer(own, is_fed=layer.kind == "fed_layer", is_causal=self._is_causal(layer))
        if layer.kind in ("head", "tied_head"):
            return self._head(step.lengths.labels)
        if layer.kind == "masked_head":
            work = self._products([(step.micro_batch_size * step.lengths.labels, model.hidden_size, model.hidden_size)])
            return _Work(matmul=3 * work)
        if layer.kind in ("embedding", "words", "norm"):
            touched = step.micro_batch_size * own * model.hidden_size * step.width / step.split
            return _Work(memory=8 * touched / self.memory)
        return _Work()

    def _is_causal(self, layer: PlannedLayer) -> bool:
        return self.model.architecture == "gpt" or layer.in_decoder

    def _transformer(self, own: int, is_fed: bool, is_causal: bool) -> _Work:
        step, model = self.step, self.model
        hidden, rows = model.hidden_size, step.micro_batch_size * own
        width = model.num_attention_heads * model.head_size // step.tp_size
        groups = 2 * model.query_groups * model.head_size // step.tp_size
        ffn, gates = model.ffn_size // step.tp_size, 2 if model.is_gated else 1
        products = [
            (rows, width + groups, hidden),
            (rows, hidden, width),
            (rows, gates * ffn, hidden),
            (rows, hidden, ffn),
        ]
        prefix = step.prefix_length
        # Behind a prefix causal attention takes a mask, and computes the whole square.
        squares = [(own, own + prefix, is_causal and not prefix)]
        if is_fed:
            products += [(rows, width, hidden), (rows, hidden, width)]
            products += [(step.micro_batch_size * step.lengths.encoder, 2 * width, hidden)]
            squares += [(own, step.lengths.encoder + prefix, False)]
        matmul = self._products(products)
        core, core_back, kept, kept_back = self._core(squares, width)
        plain, plain_back = self._elementwise(rows, width + groups, width, ffn, gates, len(squares))
        again = 1 if step.recompute == "full" else 0
        core_again = bool(again) or (step.recompute == "selective" and step.kernel_keeps_scores)
        return _Work(
            matmul=matmul * (3 + again),
            core=core * (2 if core_again else 1) + core_back,
            memory=plain * (1 + again) + plain_back + kept * (2 if core_again else 1) + kept_back,
        )

    def _products(self, shapes: list[tuple[int, int, int]]) -> float:
        """Multiply matrices once: shapes are M, N, K."""
        flops = sum(2 * m * n * k for m, n, k in shapes)
        operands = sum(m * k + k * n + m * n for m, n, k in shapes)
        return flops / self.rate + self.step.width * operands / self.memory

    def _core(self, squares: list[tuple[int, int, bool]], width: int) -> tuple[float, float, float, float]:
        """Return seconds forward and backward of the products, and of the scores where they are kept."""
        step = self.step
        micro, heads = step.micro_batch_size, self.model.num_attention_heads / step.tp_size
        if step.kernel_keeps_scores:
            forward = sum(4 * width * micro * own * keys for own, keys, _ in squares) / self.rate
            scores = sum(heads * micro * own * keys for own, keys, _ in squares) / self.memory
            return forward, 2 * forward, scores * (5 * step.width + 1), scores * (8 * step.width + 1)
        halved = sum(4 * width * micro * own * keys / (2 if is_causal else 1) for own, keys, is_causal in squares)
        forward = halved / (self.rate * FUSED_RATE)
        return forward, 2.5 * forward, 0.0, 0.0

    def _elementwise(
        self, rows: int, qkv: int, width: int, ffn: int, gates: int, num_cores: int
    ) -> tuple[float, float]:
        """Return seconds forward and backward: norms and residuals over the hidden states, copies over the heads."""
        step = self.step
        e, states = step.width, rows * self.model.hidden_size / step.split
        sublayers = 1 + num_cores
        forward = states * sublayers * (5 * e + 1) + rows * e * (num_cores * 2 * (qkv + width) + (1 + gates) * ffn)
        backward = states * sublayers * (8 * e + 1) + rows * e * (num_cores * 2 * (qkv + width) + (1 + 2 * gates) * ffn)
        return forward / self.memory, backward / self.memory

    def _head(self, labels: int) -> _Work:
        step, model = self.step, self.model
        rows, columns = step.micro_batch_size * labels, model.padded_vocab_size // step.tp_size
        # The loss makes fp32 of the logits, takes their softmax and turns it to the gradient.
        return _Work(
            matmul=3 * self._products([(rows, columns, model.hidden_size)]),
            memory=rows * columns * (4 * step.width + 24) / self.memory,
        )
