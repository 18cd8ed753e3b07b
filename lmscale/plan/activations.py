"""Bytes of the tensors that a forward pass keeps for its backward pass, on one rank of each pipeline stage.

Derived from what our layers keep, tensor by tensor; tests/plan/test_activations.py counts them in torch's graph.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.plan.stages import PlannedLayer, stage_layers

STATISTICS_WIDTH = 4
"""Bytes of a norm's statistics and of attention's log-sums, kept in fp32."""
INDEX_WIDTH = 8
MATH_WIDTH = 4
"""Bytes of a number in the math kernel, which widens half precision."""


@dataclass(frozen=True)
class StepShape:
    """What decides the activations of a step beside the model.

    Attributes:
        lengths: of the samples.
        micro_batch_size: samples of a micro batch on one data-parallel rank.
        num_micro_batches: micro batches of a step on one data-parallel rank.
        tp_size: tensor-parallel ranks.
        pp_size: pipeline stages.
        sequence_parallel: hidden states are split over the tensor-parallel ranks.
        recompute: none, selective or full.
        precision: fp32, bf16 or fp16.
        kernel_keeps_scores: attention runs on torch's math kernel, which keeps the scores for backward. The fused
            kernels (flash, memory-efficient) do not.
        has_mask: a decoder-only model's tokens see less than all that precede them (packed documents, prefix LM), so
            that a mask is kept. Encoders and fed decoders have one always.
        device_type: cuda or cpu: a CPU keeps dropout's mask in the width of what it drops, and RMSNorm's normalized
            input.
        prefix_length: trained keys and values in front of every attention's.
        prefix_dropout: they are dropped out, for each row apart.
    """

    lengths: SampleLengths
    micro_batch_size: int
    num_micro_batches: int
    tp_size: int = 1
    pp_size: int = 1
    sequence_parallel: bool = False
    recompute: str = "none"
    precision: str = "bf16"
    kernel_keeps_scores: bool = False
    has_mask: bool = False
    device_type: str = "cuda"
    prefix_length: int = 0
    prefix_dropout: bool = False

    @property
    def width(self) -> int:
        """Bytes of a number in forward and backward."""
        return 4 if self.precision == "fp32" else 2

    @property
    def split(self) -> int:
        """Ranks that hidden states between the matrices are split over."""
        return self.tp_size if self.sequence_parallel else 1

    @property
    def dropout_width(self) -> int:
        """Bytes that dropout keeps for each number."""
        return self.width if self.device_type == "cpu" else 1


def activation_bytes(model: ModelConfig, step: StepShape, stage: int) -> dict[str, int]:
    """Count what is alive at the peak on a rank of a pipeline stage.

    1F1B runs min(pp_size - stage, num_micro_batches) forward passes before the first backward; a run without a pipeline
    holds one micro batch.

    Args:
        model: the architecture.
        step: sizes and kernels.
        stage: the stage, from 0.

    Returns:
        Bytes by kind: "layers": the transformer layers with their norms; under full recompute, their inputs and one
        layer's tensors, computed again. "embedding". "logits": the head, and the logits that the loss turns to their
        gradient in place. "wire": what the pipeline holds to send and receive, and the gathered sequence under sequence
        parallelism.
    """
    layers = stage_layers(model, step.pp_size)[stage]
    in_flight = min(step.pp_size - stage, step.num_micro_batches)
    saved = saved_bytes(model, step, layers)
    recomputed = 0
    if step.recompute == "full":
        recomputed = max(
            (_layer(model, step, layer) - _layer_input(model, step, layer) for layer in set(layers)), default=0
        )
    return {
        "layers": in_flight * saved["layers"] + max(0, recomputed),
        "embedding": in_flight * saved["embedding"],
        "logits": in_flight * saved["logits"],
        "wire": _wire(model, step, stage, in_flight),
    }


def saved_bytes(model: ModelConfig, step: StepShape, layers: list[PlannedLayer]) -> dict[str, int]:
    """Count what the forward pass of one micro batch through some layers keeps: layers, embedding, logits."""
    totals = {"layers": 0, "embedding": 0, "logits": 0}
    seen_bias: set[str] = set()
    for layer, number in Counter(layers).items():
        match layer.kind:
            case "words" | "embedding":
                totals["embedding"] += number * _embedding(model, step, layer)
            case "masked_head" | "tied_head" | "head" | "output_bias":
                totals["logits"] += number * _head(model, step, layer)
            case "bias":
                if layer.tied not in seen_bias:
                    totals["layers"] += _relative_bias(model, step, layer)
                seen_bias.add(str(layer.tied))
            case "norm":
                totals["layers"] += number * _final_norm(model, step, layer)
            case _ if step.recompute == "full":
                totals["layers"] += number * _layer_input(model, step, layer)
            case _:
                totals["layers"] += number * _layer(model, step, layer)
    if any(layer.kind == "fed_layer" for layer in layers) and not _joins_memory(model, step):
        totals["layers"] += _encoder_tokens(step) * model.hidden_size * step.width // step.split
    return totals


def korthikanti_bytes(model: ModelConfig, step: StepShape) -> int:
    """Estimate one layer's activations for one micro batch by the published formula, beside ours.

    With b, s, h, a heads and t tensor-parallel ranks, in half precision, all dropouts on, f = 4 h:

        s b h (10 + 24 / t + 5 a s / (h t)); with sequence parallelism s b h / t (34 + 5 a s / h); selective recompute
        drops the term in a; full leaves 2 s b h.

    Source: Korthikanti et al. 2022, arXiv:2205.05198, table 2 and sec. 5.
    """
    tokens, hidden, tp_size = _encoder_tokens(step), model.hidden_size, step.tp_size
    if step.recompute == "full":
        return 2 * tokens * hidden
    scores = 0 if step.recompute == "selective" else 5 * model.num_attention_heads * step.lengths.encoder * tokens
    if step.sequence_parallel:
        return (34 * tokens * hidden + scores) // tp_size
    return 10 * tokens * hidden + (24 * tokens * hidden + scores) // tp_size


def _encoder_tokens(step: StepShape) -> int:
    return step.micro_batch_size * step.lengths.encoder


def _tokens(step: StepShape, layer: PlannedLayer) -> int:
    """Tokens of a micro batch that an entry of the list works on."""
    return step.micro_batch_size * (step.lengths.decoder if layer.in_decoder else step.lengths.encoder)


def _joins_memory(model: ModelConfig, step: StepShape) -> bool:
    """Whether each decoder layer keeps the hidden states and the encoder's output joined: in a pipeline."""
    return model.has_decoder_stack and step.pp_size > 1


def _hidden(model: ModelConfig, step: StepShape, tokens: int) -> int:
    """Bytes of hidden states between the matrices."""
    return tokens * model.hidden_size * step.width // step.split


def _norm(model: ModelConfig, step: StepShape, tokens: int) -> int:
    """Count what a norm keeps: its input and, for each token, mean and deviation.

    On a CPU RMSNorm keeps what it has normalized too, before the weight.
    """
    if model.normalization == "layernorm":
        return _hidden(model, step, tokens) + 2 * STATISTICS_WIDTH * tokens // step.split
    inputs = 2 if step.device_type == "cpu" else 1
    return inputs * _hidden(model, step, tokens) + STATISTICS_WIDTH * tokens // step.split


def _hidden_dropout(model: ModelConfig, step: StepShape, tokens: int) -> int:
    return tokens * model.hidden_size * step.dropout_width // step.split if model.hidden_dropout else 0


def _embedding(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    tokens = _tokens(step, layer)
    if layer.kind == "words":
        return INDEX_WIDTH * tokens + (tokens if step.tp_size > 1 else 0)
    normed = _norm(model, step, tokens) if model.embedding_norm else 0
    if step.sequence_parallel and _keeps_whole_embedding(model, step, layer):
        normed += (step.tp_size - 1) * _hidden(model, step, tokens)
    looked_up = (model.architecture == "bert") + (step.has_mask and model.position_embedding == "learned")
    return normed + looked_up * INDEX_WIDTH * tokens + _hidden_dropout(model, step, tokens)


def _keeps_whole_embedding(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> bool:
    """Tell whether the whole sequence stays behind the part of it that a rank goes on with, being the same storage.

    It does where the part is read as it is: by the embedding's norm, or by the first layer where no dropout and no
    joining to the memory copies it.
    """
    is_copied = model.hidden_dropout > 0 or (layer.in_decoder and _joins_memory(model, step))
    return model.embedding_norm or not is_copied


def _final_norm(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    tokens = _tokens(step, layer)
    # Its input is a part of what the last decoder layer joined.
    joined = _encoder_tokens(step) if layer.in_decoder and _joins_memory(model, step) else 0
    dropped = _hidden_dropout(model, step, tokens) if model.architecture == "t5" else 0
    return _norm(model, step, tokens) + _hidden(model, step, joined) + dropped


def _relative_bias(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    """Buckets and mask; and the bias itself where the kernel, not a sum before it, reads it."""
    length = step.lengths.decoder if layer.in_decoder else step.lengths.encoder
    pairs = length * length
    bias = pairs * step.micro_batch_size * model.num_attention_heads // step.tp_size * step.width
    is_read_again = not _keeps_scores(model, step, is_self=True) or step.recompute != "none"
    return pairs * (INDEX_WIDTH + step.micro_batch_size) + (bias if is_read_again else 0)


def _layer_input(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    if layer.kind not in ("layer", "fed_layer"):
        return 0
    joined = _encoder_tokens(step) if layer.kind == "fed_layer" and _joins_memory(model, step) else 0
    return _hidden(model, step, _tokens(step, layer) + joined)


def _layer(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    """Everything that one transformer layer keeps."""
    if layer.kind not in ("layer", "fed_layer"):
        return 0
    tokens = _tokens(step, layer)
    num_sublayers = 3 if layer.kind == "fed_layer" else 2
    total = _layer_input(model, step, layer)
    # Pre-norm: each norm keeps its input, the first of which is the layer's, and its output enters the sub-layer.
    # Post-norm: the sub-layer's input, the first of which is the layer's, and the sum that the norm reads.
    total += num_sublayers * (_norm(model, step, tokens) + _hidden(model, step, tokens)) - _hidden(model, step, tokens)
    total += num_sublayers * _hidden_dropout(model, step, tokens)
    if layer.kind == "fed_layer" and _joins_memory(model, step) and model.norm_position == "pre":
        # The norm keeps the joined tensor, and the projection of the memory a copy of its part, where it is no block.
        is_block = step.sequence_parallel or step.micro_batch_size == 1
        total += 0 if is_block else _hidden(model, step, _encoder_tokens(step))
    total += _self_attention(model, step, layer) + _feed_forward(model, step, tokens)
    return total + (_cross_attention(model, step, tokens) if layer.kind == "fed_layer" else 0)


def _feed_forward(model: ModelConfig, step: StepShape, tokens: int) -> int:
    """Count the activation's input and output, with a gate their product, and dropout's mask and output."""
    inner = tokens * model.ffn_size // step.tp_size
    if step.recompute == "selective":
        return inner * (2 if model.is_gated else 1) * step.width
    kept = 4 if model.is_gated else 2
    if model.activation == "relu":
        kept = 1  # its derivative is read from its output
    dropped = inner * step.dropout_width if model.ffn_dropout else 0
    if model.ffn_dropout and model.activation == "relu":
        kept += 1
    return kept * inner * step.width + dropped


def _keeps_scores(model: ModelConfig, step: StepShape, *, is_self: bool) -> bool:
    """Tell whether an attention runs on the math kernel.

    On a CPU it does with dropout, and with a bias that needs a gradient: the fused kernel there knows neither.
    """
    if step.device_type == "cpu":
        return bool(model.attention_dropout) or (is_self and model.position_embedding == "relative")
    return step.kernel_keeps_scores


@dataclass(frozen=True)
class _Attention:
    """One core attention of a layer.

    Attributes:
        queries: tokens of a micro batch that ask.
        keys: tokens of a micro batch that are asked.
        key_length: keys of a sample.
        projected: numbers that the projections, and rotation where there is one, hand over and that stay.
        value_storage: numbers of the projection's output that holds the values.
        mask_rows: queries of the mask that is given, where it is not the kernel's own causal one: of a micro batch, or of
            one sample where all have the same; 0: none.
        keeps_scores: it runs on the math kernel.
    """

    queries: int
    keys: int
    key_length: int
    projected: int
    value_storage: int
    mask_rows: int
    keeps_scores: bool


def _self_attention(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    tokens = _tokens(step, layer)
    length = step.lengths.decoder if layer.in_decoder else step.lengths.encoder
    width, group_width = _widths(model, step)
    has_rope = model.position_embedding == "rope"
    # One matrix makes all three, and what reads a part of its output keeps the whole of it; rotation copies queries and
    # keys, and queries of several heads to a group are copied to lie as heads.
    storage = width + 2 * group_width
    is_masked = step.has_mask if model.architecture == "gpt" else not layer.in_decoder
    if step.prefix_length:
        # Keys and values are copied behind the prefix's, and the matrix's output stays where queries are read in it.
        copies_queries = has_rope or group_width < width
        projected = tokens * (width if copies_queries else storage) + 2 * group_width * (tokens + _prefix_keys(step))
        value_storage = group_width * (tokens + _prefix_keys(step))
    else:
        copied = (width if has_rope or group_width < width else 0) + (group_width if has_rope else 0)
        projected, value_storage = tokens * (storage + copied), tokens * storage
    own_mask = length if step.prefix_length else 0  # behind a prefix the causal one is given, of one sample
    core = _Attention(
        tokens,
        tokens + _prefix_keys(step),
        length + step.prefix_length,
        projected,
        value_storage,
        0 if model.position_embedding == "relative" else tokens if is_masked else own_mask,
        _keeps_scores(model, step, is_self=True),
    )
    # Cosine and sine in fp32, a pair for each layer; of each sample where positions restart.
    tables = 8 * model.head_size * (tokens if step.has_mask else length + step.prefix_length) if has_rope else 0
    return tables + _core(model, step, core) + _prefix_dropout(step, group_width)


def _prefix_keys(step: StepShape) -> int:
    """Keys that a trained prefix adds to those of a micro batch, in each attention."""
    return step.micro_batch_size * step.prefix_length


def _prefix_dropout(step: StepShape, group_width: int) -> int:
    return 2 * group_width * _prefix_keys(step) * step.dropout_width if step.prefix_dropout else 0


def _cross_attention(model: ModelConfig, step: StepShape, tokens: int) -> int:
    width, _ = _widths(model, step)
    keys = _encoder_tokens(step)
    all_keys = keys + _prefix_keys(step)
    projected = width * (tokens + 2 * all_keys)
    keeps_scores = _keeps_scores(model, step, is_self=False)
    value_storage = width * all_keys if step.prefix_length else 2 * width * keys
    length = step.lengths.encoder + step.prefix_length
    core = _Attention(tokens, all_keys, length, projected, value_storage, tokens, keeps_scores)
    return _core(model, step, core) + _prefix_dropout(step, width)


def _widths(model: ModelConfig, step: StepShape) -> tuple[int, int]:
    """Width of this rank's queries, and of its keys."""
    head = model.head_size
    return model.num_attention_heads * head // step.tp_size, model.query_groups * head // step.tp_size


def _core(model: ModelConfig, step: StepShape, core: _Attention) -> int:
    """Count what the kernel keeps, and its output, which the projection behind it reads."""
    width, group_width = _widths(model, step)
    heads = model.num_attention_heads // step.tp_size
    out = width * core.queries * step.width
    projected = core.projected * step.width
    if not core.keeps_scores:
        # A mask of true and false is turned to numbers for each call.
        mask = core.mask_rows * core.key_length * step.width
        return projected + out + mask + STATISTICS_WIDTH * heads * core.queries
    if step.recompute == "selective":
        return projected + out
    # Scaled queries and keys, and the values, each copied to be one batch of matrices, where they are not that already.
    is_view = (
        step.precision == "fp32" and group_width == width and (step.sequence_parallel or step.micro_batch_size == 1)
    )
    values = core.value_storage if is_view else width * core.keys
    scores = heads * core.queries * core.key_length
    dropped = scores * (MATH_WIDTH + (MATH_WIDTH if step.device_type == "cpu" else 1)) if model.attention_dropout else 0
    return MATH_WIDTH * (width * (core.queries + core.keys) + values + scores) + dropped + out


def _head(model: ModelConfig, step: StepShape, layer: PlannedLayer) -> int:
    labels, hidden = step.micro_batch_size * step.lengths.labels, model.hidden_size
    if layer.kind == "output_bias":
        return 0
    if layer.kind == "masked_head":
        rows = labels * hidden * step.width
        whole = _encoder_tokens(step) * hidden * step.width
        pooled = step.micro_batch_size * hidden * step.width if model.next_sentence_head else 0
        return whole + 3 * rows + labels * (INDEX_WIDTH + 2 * STATISTICS_WIDTH) + pooled
    return labels * (hidden + model.padded_vocab_size // step.tp_size) * step.width


def _wire(model: ModelConfig, step: StepShape, stage: int, in_flight: int) -> int:
    """Received and sent hidden states, and the sequence that sequence parallelism gathers for a multiplication."""
    longest = max(step.lengths.encoder, step.lengths.decoder) * step.micro_batch_size
    gathered = longest * model.hidden_size * step.width if step.sequence_parallel else 0
    if step.pp_size == 1:
        return gathered
    tokens = step.micro_batch_size * step.lengths.nominal
    sent = _hidden(model, step, tokens)
    # The engine clones what it receives before the forward pass and holds the original for its gradient; the buffer
    # that it is received in stays; what is sent is held until its gradient comes, which has a buffer too.
    received = (in_flight + 2) * sent if stage > 0 else 0
    passed_on = (in_flight + 1) * sent if stage < step.pp_size - 1 else 0
    return gathered + received + passed_on
