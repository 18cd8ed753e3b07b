"""What an adaptation adds to a model and which parameters it trains, by name, without building anything."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from lmscale.config.adapt import (
    AdaptConfig,
    AdapterConfig,
    BitFitConfig,
    FullConfig,
    LoraConfig,
    PrefixTuningConfig,
    ProbingConfig,
    PromptTuningConfig,
    PTuningV2Config,
)
from lmscale.config.model import ModelConfig
from lmscale.config.run import RunConfig
from lmscale.config.task import HEADS, HeadKind
from lmscale.plan.lora import lora_shapes, targets_of
from lmscale.plan.names import Shape, parameter_shapes
from lmscale.plan.probing import probe_shapes

TASK_HEAD = "task_head"
"""The layer that a task puts in the place of the language-model head."""
POOLER, CLASSIFIER = f"{TASK_HEAD}.pooler", f"{TASK_HEAD}.classifier"
FUSED_BIAS = "attention.linear_qkv.bias"
"""The bias that queries, keys and values share."""
_ROW_BIAS = "row_bias.bias"
_LAYER = re.compile(r"^((?:encoder_|decoder_)?layers)\.(\d+)\.")
_NORMS = ("*norm.weight", "*norm.bias")


@dataclass(frozen=True)
class Head:
    """What a task puts in the place of the language-model head."""

    kind: HeadKind
    """classes: of a sequence; token_classes: of each token; span: a start and an end; value: a number."""
    num_outputs: int
    """Classes; 2 of a span, 1 of a value."""


@dataclass(frozen=True)
class Adaptation:
    """A base model, what is done to it, and the head that a task gives it."""

    model: ModelConfig
    adapt: AdaptConfig | None = None
    """None trains everything."""
    head: Head | None = None
    """None keeps the language-model head."""

    @property
    def is_added(self) -> bool:
        """Whether checkpoints hold the adaptation alone; full fine-tuning's are whole models."""
        return self.adapt is not None and not isinstance(self.adapt, FullConfig)

    @cached_property
    def base(self) -> frozenset[str]:
        """The logical names of the base's parameters that stay."""
        return frozenset(
            name for name in parameter_shapes(self.model) if self.head is None or not _is_replaced(name, self.model)
        )

    def shapes(self, padded: bool = True) -> dict[str, Shape]:
        """List all parameters of the adapted model, as `parameter_shapes` lists the base's."""
        stay = {name: shape for name, shape in parameter_shapes(self.model, padded).items() if name in self.base}
        if isinstance(self.adapt, ProbingConfig) and self.head is not None:
            return stay | probe_shapes(self.model, self.adapt, self.head.num_outputs)  # outside of the model
        own = own_shapes(self.model, self.adapt, padded) if self.adapt is not None else {}
        return stay | own | (head_shapes(self.model, self.head) if self.head is not None else {})

    def trains(self, name: str) -> bool:
        """Tell whether a parameter is trained: all that the base has not, and of the base what the method says."""
        if self.adapt is None:
            return True
        if name.startswith(POOLER) and self.model.next_sentence_head:
            return _trains_of_base(name, self.model, self.adapt)  # BERT's, pretrained
        return name not in self.base or _trains_of_base(name, self.model, self.adapt)

    def num_trained(self, name: str, size: int) -> int:
        """Count the numbers that are trained of a parameter that has `size`: of a fused bias, those of queries at most."""
        if not self.trains(name):
            return 0
        if not isinstance(self.adapt, BitFitConfig) or self.adapt.which == "all":
            return size
        if not (base_bias_of(name) or name).endswith(FUSED_BIAS):
            return size
        return self.adapt.entries * self.model.num_attention_heads * self.model.head_size

    def rate_multiplier(self, name: str) -> float:
        """Return what the rate of a parameter is multiplied by: 1 but for full fine-tuning with a decay over the layers.

        layer_decay^(L - 1 - i) in layer i of L; layer_decay^L before the layers; 1 behind them.
        """
        adapt = self.adapt
        if not isinstance(adapt, FullConfig) or adapt.layer_decay == 1.0:
            return 1.0
        layer = _LAYER.match(name)
        if layer is not None:
            return adapt.layer_decay ** (self.model.num_layers - 1 - int(layer.group(2)))
        return adapt.layer_decay**self.model.num_layers if _is_before_layers(name) else 1.0


def adaptation_of(config: RunConfig) -> Adaptation | None:
    """Describe what a run adapts; None where it pretrains."""
    head = head_of(config)
    return None if config.adapt is None and head is None else Adaptation(config.model, config.adapt, head)


def head_of(config: RunConfig) -> Head | None:
    """Return the head of a run's task, whose labels are listed (`lmscale.tasks.resolve`); None where there is none."""
    task = config.task
    if task is None or task.output_of(config.model.architecture) == "text":
        return None
    kind = HEADS[task.kind]
    return Head(kind, {"span": 2, "value": 1}.get(kind) or len(task.labels or ()))


def own_shapes(model: ModelConfig, adapt: AdaptConfig, padded: bool = True) -> dict[str, Shape]:
    """List the parameters that a method adds to a model, by logical name; a task's head is not among them.

    Args:
        model: the base.
        adapt: the method.
        padded: count rows of padding, as plan.names does.
    """
    if isinstance(adapt, LoraConfig):
        shapes = lora_shapes(model, adapt, padded)
    elif isinstance(adapt, AdapterConfig):
        shapes = _adapter_shapes(model, adapt)
    elif isinstance(adapt, PromptTuningConfig):
        place = "encoder_embedding" if model.has_decoder_stack else "input_embedding"
        shapes = {f"{place}.prompt.table": (adapt.length, model.hidden_size)}
    elif isinstance(adapt, PrefixTuningConfig | PTuningV2Config):
        shapes = _prefix_shapes(model, adapt)
    elif isinstance(adapt, BitFitConfig) and adapt.entries > 1:
        # Of one adaptation they are the base's own; of several, stand beside them.
        shapes = {row_bias_of(name): shape for name, shape in bitfit_shapes(model, adapt).items()}
    else:
        return {}
    return {name: (adapt.entries, *shape) for name, shape in shapes.items()} if adapt.entries > 1 else shapes


def bitfit_shapes(model: ModelConfig, adapt: BitFitConfig) -> dict[str, Shape]:
    """List the biases of a model that BitFit trains, by logical name."""
    shapes = parameter_shapes(model)
    return {name: shape for name, shape in shapes.items() if is_bias(name) and _is_chosen(name, adapt)}


def row_bias_of(name: str) -> str:
    """Name what holds the values that each of several adaptations has of a bias of the base."""
    return f"{name.removesuffix('bias')}{_ROW_BIAS}"


def base_bias_of(name: str) -> str | None:
    """Name the bias of the base that a parameter holds several adaptations' values of; None where it holds none."""
    return f"{name.removesuffix(_ROW_BIAS)}bias" if name.endswith(f".{_ROW_BIAS}") else None


def head_shapes(model: ModelConfig, head: Head) -> dict[str, Shape]:
    """List the parameters of a task's head: a pooler of encoders' sequences, and the classifier."""
    hidden = model.hidden_size
    shapes: dict[str, Shape] = {}
    if has_pooler(model, head):
        shapes |= {f"{POOLER}.weight": (hidden, hidden), f"{POOLER}.bias": (hidden,)}
    return shapes | {f"{CLASSIFIER}.weight": (head.num_outputs, hidden), f"{CLASSIFIER}.bias": (head.num_outputs,)}


def has_pooler(model: ModelConfig, head: Head) -> bool:
    """Tell whether a head transforms the first token's state before it classifies: in encoders, of whole sequences."""
    return model.is_encoder_only and head.kind in ("classes", "value")


def _is_replaced(name: str, model: ModelConfig) -> bool:
    """Tell whether a parameter is of the language-model head, tied ones aside; of two stacks, of the decoder too."""
    if model.has_decoder_stack and name.startswith(("decoder_", "final_norm.")):
        return True
    return name.startswith(("masked_head.", "output_bias.", "head."))


def _trains_of_base(name: str, model: ModelConfig, adapt: AdaptConfig) -> bool:
    """Tell whether a method trains a parameter of the base."""
    if isinstance(adapt, FullConfig):
        return _is_on_top(name, model, adapt.top_layers)
    if isinstance(adapt, BitFitConfig):
        return adapt.entries == 1 and is_bias(name) and _is_chosen(name, adapt)
    if isinstance(adapt, LoraConfig) and adapt.bias != "none":
        mine = {f"{place}.bias" for place in targets_of(model, adapt)}
        return is_bias(name) and (adapt.bias == "all" or name in mine)
    if isinstance(adapt, AdapterConfig):
        is_norm = any(fnmatchcase(name, pattern) for pattern in _NORMS)
        return adapt.trains_norms and is_norm and not name.startswith("masked_head")
    return False


def is_bias(name: str) -> bool:
    """Tell whether a parameter is a bias, of a linear layer or a norm, of the model proper: no head's."""
    return name.endswith(".bias") and not name.startswith(("masked_head", "output_bias"))


def _is_on_top(name: str, model: ModelConfig, top_layers: int | None) -> bool:
    if top_layers is None:
        return True
    layer = _LAYER.match(name)
    if layer is not None:
        return int(layer.group(2)) >= model.num_layers - top_layers
    return not _is_before_layers(name)


def _is_before_layers(name: str) -> bool:
    return "embedding" in name.partition(".")[0] or "relative_bias" in name


def _is_chosen(name: str, adapt: BitFitConfig) -> bool:
    return adapt.which == "all" or _is_of_query_or_fc1(name)


def _is_of_query_or_fc1(name: str) -> bool:
    """Tell whether a bias is that of queries, whose tensor keys and values share, or of the first feed-forward matrix."""
    return name.endswith((FUSED_BIAS, "cross_attention.linear_q.bias", "mlp.linear_fc1.bias"))


def _stacks(model: ModelConfig) -> list[tuple[str, bool]]:
    """List the stacks: (before the layer's number, whether an encoder feeds it)."""
    return [("encoder_layers", False), ("decoder_layers", True)] if model.has_decoder_stack else [("layers", False)]


def _adapter_shapes(model: ModelConfig, adapt: AdapterConfig) -> dict[str, Shape]:
    hidden, width = model.hidden_size, adapt.width
    shapes: dict[str, Shape] = {}
    for stack, _ in _stacks(model):
        for index in range(model.num_layers):
            for slot in adapt.slots:
                place = f"{stack}.{index}.{slot}"
                shapes |= {f"{place}.down.weight": (width, hidden), f"{place}.down.bias": (width,)}
                shapes |= {f"{place}.up.weight": (hidden, width), f"{place}.up.bias": (hidden,)}
    return shapes


def attentions(model: ModelConfig) -> list[tuple[str, str, int]]:
    """List the attentions of a model: (logical name of the core attention, its kind: self, decoder_self or cross, layer)."""
    found = []
    for stack, is_fed in _stacks(model):
        for index in range(model.num_layers):
            place = f"{stack}.{index}"
            found.append((f"{place}.attention.core_attention", "decoder_self" if is_fed else "self", index))
            if is_fed:
                found.append((f"{place}.cross_attention.core_attention", "cross", index))
    return found


def _prefix_shapes(model: ModelConfig, adapt: PrefixTuningConfig | PTuningV2Config) -> dict[str, Shape]:
    """With a network: inputs, the first matrix and its bias of each kind of attention, the rows of the second by layer."""
    width = 2 * model.query_groups * model.head_size
    shapes: dict[str, Shape] = {}
    for name, kind, _ in attentions(model):
        if adapt.projection is None:
            groups = (model.query_groups, model.head_size)
            shapes[f"{name}.prefix.table"] = (adapt.length, 2, *groups)
            continue
        trunk = f"prefix_{kind}"
        shapes |= {f"{trunk}.inputs": (adapt.length, model.hidden_size)}
        shapes |= {f"{trunk}.weight": (adapt.projection, model.hidden_size), f"{trunk}.bias": (adapt.projection,)}
        shapes |= {f"{name}.prefix.weight": (width, adapt.projection), f"{name}.prefix.bias": (width,)}
    return shapes
