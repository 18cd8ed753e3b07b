"""What the ranks say to one another in a training step: collectives by axis, with calls and bytes.

The rules are those of this stack, as it is counted on gloo in tests/plan/test_communication.py: megatron-core's tensor
parallelism, DeepSpeed's pipelines and ZeRO. Norms, losses, overflow flags and other messages of a few bytes are left out.

With b micro batch, s length, h hidden, e bytes of an element, m micro batches, P parameters of this rank, per rank:

    tensor    a layer: 2 all-reduces of b s h e forward, 2 backward; a layer that an encoder feeds: 3 and 4; the word table
              1 forward, the head 1 backward; the loss: all-reduces of 4 b l and 8 b l. With recompute: full, forward's
              all-reduces run again, but for the last, whose result nothing keeps.
    sequence  in the place of each all-reduce forward an all-gather and a reduce-scatter, backward two all-gathers and a
              reduce-scatter; biases of row-parallel matrices and norms: an all-reduce of their gradients.
    pipeline  b s h e on to the next stage, its gradient back; under sequence parallelism a t-th of it; integers that the
              layers read; once a step the gradient of tied tables, in fp32 where gradients are summed in fp32.
    data      ZeRO 0: all-reduce of 4 P. ZeRO 1: all-reduce of e P, all-gather of e P. ZeRO 2: all-reduce of e P after each
              micro batch, all-gather of e P. ZeRO 3: reduce-scatter of e P after each micro batch; all-gather forward of
              tensors above `PERSISTENT_ELEMENTS` in each micro batch, of the others once; backward again, but for the
              last `REUSED_ELEMENTS` of forward.

DeepSpeed's stages 1 and 2 sum whole buckets on every rank where a reduce-scatter would do, and in bf16 they send
gradients as bf16, whether micro batches are summed in fp32 or not.

Source: Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2 (tensor, sequence); Rajbhandari et al. 2020,
arXiv:1910.02054, sec. 7 (data), from which DeepSpeed differs as said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lmscale.config.model import ModelConfig
from lmscale.plan.activations import StepShape
from lmscale.plan.stages import PlannedLayer, layer_parameters, stage_layers

Axis = Literal["tensor", "pipeline", "data"]
Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "send"]
_Add = Callable[[Collective, str, int], None]
"""Notes (collective, what, bytes of a micro batch)."""
PERSISTENT_ELEMENTS = 100_000
"""stage3_param_persistence_threshold's default: ZeRO 3 keeps smaller tensors whole."""
REUSED_ELEMENTS = 500_000_000
"""Half of stage3_max_reuse_distance's default: what forward gathers last and backward needs first stays gathered."""


@dataclass(frozen=True)
class Traffic:
    """Some calls of one collective in a step, on one rank."""

    axis: Axis
    collective: Collective
    num_bytes: int
    """Of the whole tensors, over all calls: what an all-gather gives, what a reduce-scatter takes."""
    group_size: int
    """Ranks that take part."""
    what: str
    """What is communicated, or when: forward, backward, recompute, loss, gradients, parameters."""

    @property
    def wire_bytes(self) -> float:
        """Bytes that this rank sends where the ranks form a ring: 2 (n - 1) / n of an all-reduce, else half of that."""
        if self.collective == "send":
            return self.num_bytes
        share = (self.group_size - 1) / self.group_size
        return (2 if self.collective == "all_reduce" else 1) * share * self.num_bytes


def element_bytes(precision: str) -> int:
    """Return the bytes of a number in forward and backward."""
    return 4 if precision == "fp32" else 2


def step_traffic(
    model: ModelConfig, step: StepShape, *, dp_size: int, zero_stage: int, stage: int = 0, num_parameters: int
) -> list[Traffic]:
    """List what one rank of a pipeline stage communicates in a step.

    Args:
        model: the architecture.
        step: lengths, batch and layout.
        dp_size: data-parallel ranks.
        zero_stage: ZeRO stage.
        stage: the pipeline stage, from 0.
        num_parameters: of this rank, as plan.stages counts them.
    """
    stages = stage_layers(model, step.pp_size)
    found: list[Traffic] = []
    if step.tp_size > 1:
        found += _tensor(model, step, stages[stage], is_last=stage == step.pp_size - 1)
    if step.pp_size > 1:
        found += _pipeline(model, step, stages, stage)
    if dp_size > 1:
        found += _data(model, step, stages[stage], dp_size, zero_stage, num_parameters)
    return found


class _Tally:
    """Bytes by (collective, what), each added `times` over."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Collective, str], int] = {}
        self.times = 1

    def add(self, collective: Collective, what: str, num_bytes: int) -> None:
        self.calls[collective, what] = self.calls.get((collective, what), 0) + num_bytes * self.times


def _tensor(model: ModelConfig, step: StepShape, layers: list[PlannedLayer], is_last: bool) -> Iterator[Traffic]:
    micro, repeats = step.micro_batch_size, step.num_micro_batches
    token = model.hidden_size * element_bytes(step.precision) * micro
    tally = _Tally()
    for layer, number in Counter(layers).items():
        tally.times = number * repeats
        if layer.kind in ("layer", "fed_layer"):
            _layer(model, step, layer, token, tally.add)
        else:
            _end_of_stack(model, step, layer, token, tally.add)
    if is_last:
        tally.times = repeats
        tally.add("all_reduce", "loss", 12 * micro * step.lengths.labels)
    for (collective, what), num_bytes in tally.calls.items():
        if num_bytes:
            yield Traffic("tensor", collective, num_bytes, step.tp_size, what)


def _layer(model: ModelConfig, step: StepShape, layer: PlannedLayer, token: int, add: _Add) -> None:
    """Add what a transformer layer says: column-parallel matrices at its entries, row-parallel ones at its exits."""
    encoder, decoder = step.lengths.encoder, step.lengths.decoder
    own = decoder if layer.in_decoder else encoder
    is_fed = layer.kind == "fed_layer"
    entering = 2 * own + (own + encoder if is_fed else 0)
    leaving = own * (3 if is_fed else 2)
    recomputes = step.recompute == "full"
    again = leaving - own if recomputes else 0
    if not step.sequence_parallel:
        add("all_reduce", "forward", token * leaving)
        add("all_reduce", "backward", token * entering)
        add("all_reduce", "recompute", token * again)
        return
    add("all_gather", "forward", token * entering)
    add("reduce_scatter", "forward", token * leaving)
    add("all_gather", "backward", token * (entering + leaving))
    add("reduce_scatter", "backward", token * entering)
    add("all_gather", "recompute", token * (entering if recomputes else 0))
    add("reduce_scatter", "recompute", token * again)
    sums = (3 if is_fed else 2) * (_norm_width(model) + (1 if model.linear_bias else 0))
    add("all_reduce", "gradients", sums * model.hidden_size * element_bytes(step.precision))


def _end_of_stack(model: ModelConfig, step: StepShape, layer: PlannedLayer, token: int, add: _Add) -> None:
    length = step.lengths.decoder if layer.in_decoder else step.lengths.encoder
    splits = step.sequence_parallel
    if layer.kind == "words":
        add("all_reduce", "forward", token * length)
    elif layer.kind == "embedding" and splits:
        add("all_gather", "backward", token * length)
    elif layer.kind == "masked_head" and splits:
        add("all_gather", "forward", token * length)
    elif layer.kind in ("head", "tied_head"):
        if splits and not model.is_encoder_only:
            add("all_gather", "forward", token * length)
            add("reduce_scatter", "backward", token * length)
        else:
            add("all_reduce", "backward", token * step.lengths.labels)
    if splits and (layer.kind == "norm" or (layer.kind == "embedding" and model.embedding_norm)):
        width = _norm_width(model) * model.hidden_size
        add("all_reduce", "gradients", width * element_bytes(step.precision))


def _norm_width(model: ModelConfig) -> int:
    return 2 if model.normalization == "layernorm" else 1


def _pipeline(model: ModelConfig, step: StepShape, stages: list[list[PlannedLayer]], stage: int) -> Iterator[Traffic]:
    repeats = step.num_micro_batches
    if stage < step.pp_size - 1:
        floats, integers = _border_bytes(model, step, stages[stage + 1][0])
        yield Traffic("pipeline", "send", repeats * (floats + integers), step.pp_size, "forward")
    if stage > 0:
        floats, _ = _border_bytes(model, step, stages[stage][0])
        yield Traffic("pipeline", "send", repeats * floats, step.pp_size, "backward")
    width = 2 if step.precision == "fp16" else 4
    tied = {layer.tied: layer for layer in stages[stage] if layer.tied is not None}
    for key, layer in tied.items():
        holders = sum(any(other.tied == key for other in there) for there in stages)
        if holders > 1:
            num_bytes = width * layer_parameters(model, layer, step.tp_size)
            yield Traffic("pipeline", "all_reduce", num_bytes, holders, "tied gradients")


def _border_bytes(model: ModelConfig, step: StepShape, entered: PlannedLayer) -> tuple[int, int]:
    """Return the bytes of floating-point numbers and of integers that enter a stage, for a micro batch."""
    lengths, micro = step.lengths, step.micro_batch_size
    length = lengths.encoder + (lengths.decoder if entered.in_decoder else 0)
    split = step.tp_size if step.sequence_parallel else 1
    floats = micro * length * model.hidden_size * element_bytes(step.precision) // split
    integers = 0
    if model.has_decoder_stack:
        integers = micro * (lengths.encoder + 2 * lengths.decoder)
    elif model.is_encoder_only:
        columns = 2 if model.architecture == "bert" else 1
        integers = micro * (columns * lengths.encoder + lengths.labels)
    return floats, 8 * integers


def _data(
    model: ModelConfig, step: StepShape, layers: list[PlannedLayer], dp_size: int, zero_stage: int, num_parameters: int
) -> Iterator[Traffic]:
    whole = num_parameters * element_bytes(step.precision)
    repeats = step.num_micro_batches
    if zero_stage < 3:
        times = repeats if zero_stage == 2 else 1
        yield Traffic("data", "all_reduce", times * whole, dp_size, "gradients")
        if zero_stage:
            yield Traffic("data", "all_gather", whole, dp_size, "parameters")
        return
    yield Traffic("data", "reduce_scatter", repeats * whole, dp_size, "gradients")
    gathered = element_bytes(step.precision) * sum(
        size for size in _tensor_sizes(model, layers, step.tp_size) if size > PERSISTENT_ELEMENTS
    )
    yield Traffic("data", "all_gather", whole - gathered, dp_size, "parameters")
    again = max(0, gathered - element_bytes(step.precision) * REUSED_ELEMENTS)
    yield Traffic("data", "all_gather", repeats * (gathered + again), dp_size, "parameters")


def _tensor_sizes(model: ModelConfig, layers: list[PlannedLayer], tp_size: int) -> Iterator[int]:
    """Yield the elements of the matrices of a stage; vectors are far below any threshold."""
    hidden = model.hidden_size
    width, groups = (n * model.head_size // tp_size * hidden for n in (model.num_attention_heads, model.query_groups))
    ffn = model.ffn_size * hidden // tp_size
    seen: set[str] = set()
    for layer in layers:
        if layer.kind in ("layer", "fed_layer"):
            yield from (width + 2 * groups, width, ffn * (2 if model.is_gated else 1), ffn)
            if layer.kind == "fed_layer":
                yield from (width, 2 * width, width)
        elif layer.kind in ("words", "head", "tied_head") and layer.tied not in seen:
            yield model.padded_vocab_size // tp_size * hidden
            seen |= {layer.tied} if layer.tied else set()
        elif layer.kind == "embedding" and model.position_embedding == "learned":
            yield (model.max_position_embeddings + model.position_offset) * hidden
        elif layer.kind == "masked_head":
            yield from [hidden * hidden] * (2 if model.next_sentence_head else 1)
