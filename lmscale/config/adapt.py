"""How a pretrained model is adapted: one class for each method, told apart by `method`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmscale.config.base import Section

LoraTarget = Literal[
    "query",
    "key",
    "value",
    "qkv",
    "proj",
    "cross_query",
    "cross_key",
    "cross_value",
    "cross_proj",
    "fc1",
    "gate",
    "up",
    "fc2",
    "embedding",
]
"""The matrices that LoRA can be added to."""
AdapterInit = Literal["truncated_normal", "normal", "zero_up"]


class Method(Section):
    """What all methods have in common."""

    entries: int = Field(1, ge=1)
    """Adaptations that are trained side by side, each by its own rows of a batch; above 1, task.entry_column says whose a
    row is."""


class FullConfig(Section):
    """The model's own weights."""

    method: Literal["full"] = "full"
    """full: the model's own weights are trained on, with a new optimizer."""
    top_layers: int | None = Field(None, ge=0)
    """Train this many of the last layers (of each stack), what is behind them and the task's head only; left out, all."""
    layer_decay: float = Field(1.0, gt=0, le=1)
    """The rate of layer i of L is lr x layer_decay^(L - 1 - i), that of what is before the layers lr x layer_decay^L."""


class ProbingConfig(Section):
    """A classifier on what a frozen model computes."""

    method: Literal["probing"] = "probing"
    """probing: a classifier on the hidden states of the frozen model, which are computed once and kept."""
    head: Literal["linear", "mlp", "attention"] = "linear"
    """linear; mlp: one hidden layer of hidden_size with ReLU; attention: linear on an average over tokens whose weights come
    from a learned query."""
    pooling: Literal["cls", "first", "last", "mean"] = "mean"
    """Of a sequence's hidden states: its first token's, its last token's, or the mean over its tokens; head: attention and
    tasks that label tokens do without."""
    layers: list[int] | Literal["all", "mix"] | None = None
    """Layers to probe, 0 the embeddings, num_layers the last; each gets a classifier of its own. all: every layer; mix: one
    classifier on a learned mixture of all layers (scalar mix); left out, the last layer."""
    control: bool = False
    """Train each classifier on random labels too, one for each word type, and report selectivity: the task's accuracy less
    the control's (Hewitt and Liang 2019)."""


class PromptTuningConfig(Method):
    """Vectors in front of the embedded input."""

    method: Literal["prompt_tuning"] = "prompt_tuning"
    """prompt_tuning: trained vectors in front of the embedded input (of the encoder, for bart and t5)."""
    length: int = Field(100, ge=1)
    """Vectors, k."""
    init: Literal["uniform_sym", "uniform_pos", "vocabulary", "labels", "text"] = "vocabulary"
    """uniform_sym: U[-init_scale, init_scale]; uniform_pos: U[0, init_scale); vocabulary: embeddings of random ones of the
    5,000 most frequent tokens; labels: the mean embedding of each label word, then as vocabulary; text: the embeddings of
    init_text, repeated or cut."""
    init_scale: float = Field(0.5, gt=0)
    """Read with init: uniform_sym and uniform_pos only."""
    init_text: str | None = None
    """Read with init: text only."""


class PTuningV2Config(Method):
    """Keys and values in every layer, without a reparametrization."""

    method: Literal["p_tuning_v2"] = "p_tuning_v2"
    """p_tuning_v2: trained keys and values in front of every layer's, and the task's head."""
    length: int = Field(20, ge=1)
    """Keys and values of each layer, k."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """On the trained keys and values."""
    projection: int | None = Field(None, ge=1)
    """Width of a two-layer network that makes the keys and values, hidden_size -> projection -> 2 num_layers hidden_size, in
    place of training them directly."""


class PrefixTuningConfig(Method):
    """Keys and values in every attention."""

    method: Literal["prefix_tuning"] = "prefix_tuning"
    """prefix_tuning: trained keys and values in front of every attention's: of bart and t5, the encoder's, the decoder's and
    the cross attention's."""
    length: int = Field(10, ge=1)
    """Keys and values of each attention, k."""
    projection: int | None = Field(512, ge=1)
    """Width of the network that makes them while training, hidden_size -> tanh(projection) -> 2 num_layers hidden_size for
    each kind of attention; null trains them directly."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On the trained keys and values."""
    init: Literal["random", "text"] = "random"
    """text: begin with the keys and values that the frozen model computes for init_text."""
    init_text: str | None = None
    """Read with init: text only."""


class AdapterConfig(Method):
    """Bottlenecks in every layer."""

    method: Literal["adapter"] = "adapter"
    """adapter: bottlenecks in every layer, h + up(activation(down(h)))."""
    variant: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    """houlsby: behind attention and feed-forward, before the residual is added; pfeiffer: behind the feed-forward;
    parallel: beside the feed-forward, on its input."""
    width: int = Field(64, ge=1)
    """Of the bottleneck, m."""
    activation: Literal["gelu", "relu", "swish"] | None = None
    """Left out, gelu for houlsby, relu for the others."""
    init: AdapterInit | None = None
    """Of the two matrices, with biases of 0: truncated_normal: init_std, cut at two of them; normal: N(0, init_std); zero_up:
    Kaiming for down, 0 for up, so that training starts from the base exactly. Left out, truncated_normal for houlsby, normal
    for pfeiffer, zero_up for parallel."""
    init_std: float | None = Field(None, gt=0)
    """Left out, 0.001 for truncated_normal and 0.02 for normal; not read with zero_up."""
    scale: float | None = Field(None, gt=0)
    """The bottleneck's output is multiplied by it; left out, 4 for parallel and 1 for the others."""
    norms: bool | None = None
    """Train the norms too; left out, with houlsby only."""

    @property
    def slots(self) -> tuple[str, ...]:
        """The places in a transformer layer."""
        behind = ("attention_adapter", "mlp_adapter")
        return {"houlsby": behind, "pfeiffer": behind[1:], "parallel": ("parallel_adapter",)}[self.variant]

    @property
    def chosen_activation(self) -> str:
        """The activation, given or the variant's."""
        return self.activation or ("gelu" if self.variant == "houlsby" else "relu")

    @property
    def chosen_init(self) -> AdapterInit:
        """The init, given or the variant's."""
        usual: dict[str, AdapterInit] = {"houlsby": "truncated_normal", "pfeiffer": "normal", "parallel": "zero_up"}
        return self.init or usual[self.variant]

    @property
    def chosen_init_std(self) -> float:
        """The standard deviation, given or the init's."""
        return self.init_std or (0.001 if self.chosen_init == "truncated_normal" else 0.02)

    @property
    def chosen_scale(self) -> float:
        """The scale, given or the variant's."""
        return self.scale or (4.0 if self.variant == "parallel" else 1.0)

    @property
    def trains_norms(self) -> bool:
        """Whether the norms are trained, as said or by the variant."""
        return self.variant == "houlsby" if self.norms is None else self.norms


class LoraConfig(Method):
    """Products of two thin matrices beside the model's matrices."""

    method: Literal["lora"] = "lora"
    """lora: W + scale B A beside frozen matrices W, A of `rank` rows."""
    rank: int = Field(8, ge=1)
    """r."""
    alpha: float = Field(16.0, gt=0)
    """scale = alpha / rank, or alpha / sqrt(rank) with rslora."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) (rsLoRA)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """On what A reads."""
    targets: list[LoraTarget] = ["query", "value"]
    """The matrices: query, key, value, each apart, or qkv as one; proj; in a decoder that an encoder feeds, cross_query,
    cross_key, cross_value, cross_proj; fc1, of gated models gate and up apart; fc2; embedding."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases of the model that are trained too: none, all, or those of the targets."""


class BitFitConfig(Method):
    """The biases."""

    method: Literal["bitfit"] = "bitfit"
    """bitfit: the model's biases, those of its norms included."""
    which: Literal["all", "query_fc1"] = "all"
    """all; query_fc1: those of queries and of the first matrix of the feed-forward only."""


def _method(section: Any) -> str:
    """Tell which of the classes a mapping, or an object, is of."""
    return str(section.get("method", "") if isinstance(section, dict) else getattr(section, "method", ""))


AdaptConfig = Annotated[
    Annotated[FullConfig, Tag("full")]
    | Annotated[ProbingConfig, Tag("probing")]
    | Annotated[PromptTuningConfig, Tag("prompt_tuning")]
    | Annotated[PTuningV2Config, Tag("p_tuning_v2")]
    | Annotated[PrefixTuningConfig, Tag("prefix_tuning")]
    | Annotated[AdapterConfig, Tag("adapter")]
    | Annotated[LoraConfig, Tag("lora")]
    | Annotated[BitFitConfig, Tag("bitfit")],
    Discriminator(_method),
]


def prompt_length(adapt: AdaptConfig | None) -> int:
    """Return the trained vectors that stand in the place of tokens; 0: none."""
    return adapt.length if isinstance(adapt, PromptTuningConfig) else 0


def prefix_length(adapt: AdaptConfig | None) -> int:
    """Return the trained keys in front of every attention's; 0: none."""
    return adapt.length if isinstance(adapt, PrefixTuningConfig | PTuningV2Config) else 0


def num_adaptations(adapt: AdaptConfig | None) -> int:
    """Return how many adaptations are trained side by side; 1 where there is none."""
    return adapt.entries if isinstance(adapt, Method) else 1


METHODS = (
    "full",
    "probing",
    "prompt_tuning",
    "p_tuning_v2",
    "prefix_tuning",
    "adapter",
    "lora",
    "bitfit",
)
"""The names of all methods."""
