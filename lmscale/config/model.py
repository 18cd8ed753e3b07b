"""The architecture of a model: sizes, and the choices that change its parameters or its arithmetic."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmscale.config.base import Section

VOCAB_MULTIPLE = 128
"""The embedding table has a multiple of this many rows: it divides over any usual tp_size, so the padded size does not
depend on the layout and a checkpoint fits every layout."""


Architecture = Literal["gpt", "bert", "roberta", "bart", "t5"]


class InitConfig(Section):
    """How parameters are drawn. The same seed gives the same weights on every layout."""

    scheme: Literal["normal", "truncated_normal", "small", "fan_in", "glorot_normal", "glorot_uniform", "t5"] = "normal"
    """Of matrices of o outputs and i inputs, N(mean, standard deviation): normal: N(0, std), which with residual: scaled is
    GPT-2's, GPT-3's and Megatron's; truncated_normal: the same, drawn again beyond two std (BERT); small:
    N(0, sqrt(2 / (5 hidden_size))); fan_in: N(0, sqrt(1 / i)); glorot_normal: N(0, sqrt(2 / (i + o))); glorot_uniform:
    U(-a, a), a = sqrt(6 / (i + o)); t5: fan_in, queries smaller by sqrt(head_dim), embeddings N(0, 1)."""
    std: float = Field(0.02, gt=0)
    """Standard deviation of weights and embeddings; read with scheme: normal and truncated_normal only."""
    residual: Literal["scaled", "wang", "none"] = "scaled"
    """The projections that feed the residual stream, two in each layer (three with cross attention): scaled: the scheme's
    standard deviation divided by sqrt(2 num_layers) (GPT-2); wang: 2 / (num_layers sqrt(hidden_size)) in its place; none:
    as other matrices."""
    position_std: float | None = Field(None, gt=0)
    """Standard deviation for learned position embeddings; left out, as other embeddings."""


class ModelConfig(Section):
    """A transformer language model."""

    preset: str | None = None
    """A published size: gpt3-125m, -350m, -760m, -1.3b, -2.7b, -6.7b, -13b, -175b; bert-base, -large; roberta-base,
    -large; bart-base, -large; t5-small, -base, -large, -3b, -11b; t5-v1.1-small, -base, -large, -xl, -xxl; keys beside it
    override it."""
    architecture: Architecture = "gpt"
    """gpt: decoder-only, causal; bert, roberta: encoder-only; bart, t5: encoder and decoder. It sets the defaults of the
    keys below to those of its paper; a key that is given overrides them."""
    num_layers: int = Field(gt=0, le=10_000)
    """Transformer layers; of the encoder and of the decoder each, for bart and t5."""
    hidden_size: int = Field(gt=0, le=1_000_000)
    """Width of the residual stream."""
    num_attention_heads: int = Field(gt=0, le=100_000)
    """Query heads."""
    ffn_hidden_size: int | None = Field(None, gt=0)
    """Width of the feed-forward layer (of each half, with swiglu); left out, 4 hidden_size."""
    num_query_groups: int | None = Field(None, gt=0)
    """Key/value heads (grouped-query attention); left out, one for each query head."""
    head_dim: int | None = Field(None, gt=0)
    """Width of a head; left out, hidden_size / num_attention_heads."""
    vocab_size: int = Field(gt=0, le=100_000_000)
    """Entries of the tokenizer, special ids included. The table is padded to a multiple of 128 rows; padded rows never
    take part in the softmax."""
    max_position_embeddings: int = Field(2048, gt=0)
    """Longest sequence: rows of the position table, or the range that rope was trained for."""
    position_embedding: Literal["learned", "rope", "relative"] = "learned"
    """learned: a table added to the word embedding (GPT-2); rope: rotated queries and keys (Llama); relative: a bias on
    the attention scores for each bucket of distances (T5)."""
    position_offset: int = Field(0, ge=0)
    """Rows of the position table before that of the first position: 2 in RoBERTa and BART, whose tables begin with the
    padding's."""
    rope_theta: float = Field(10000.0, gt=0)
    """Base of rope's wavelengths; read with position_embedding: rope only."""
    relative_buckets: int = Field(32, gt=3)
    """Buckets of distances; read with position_embedding: relative only."""
    relative_max_distance: int = Field(128, gt=0)
    """Distance from which on all share the last bucket, above relative_buckets / 2; read with position_embedding: relative
    only."""
    token_types: int = Field(0, ge=0)
    """Rows of the table of token types (BERT's segments), added to the word embedding; 0: none."""
    embedding_norm: bool = False
    """Normalize the sum of the embeddings, before their dropout."""
    norm_position: Literal["pre", "post"] = "pre"
    """pre: normalize what enters each sub-layer, and the last layer's output; post: normalize each sum of residual and
    sub-layer (BERT, BART)."""
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of normalization."""
    norm_eps: float = Field(1.0e-5, gt=0)
    """Added to the variance (layernorm) or to the mean square (rmsnorm)."""
    activation: Literal["gelu_tanh", "gelu", "relu", "swiglu", "geglu"] = "gelu_tanh"
    """gelu_tanh: GPT-2's approximation; gelu: the exact one; swiglu: silu(gate) * up, two input matrices; geglu:
    gelu_tanh(gate) * up."""
    linear_bias: bool = True
    """Biases on the attention and feed-forward projections."""
    tied_head: bool = True
    """Use the word embedding as the output matrix."""
    scaled_scores: bool = True
    """Divide attention scores by the root of the head's width; T5 does not."""
    scaled_logits: bool = False
    """Divide the hidden states by the root of their width before a tied head, as T5 v1.0 does."""
    next_sentence_head: bool = False
    """Pool the first position and classify whether segment B follows segment A; bert only."""
    hidden_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the embedding and on what each sub-layer adds to the residual stream."""
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the attention probabilities."""
    ffn_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout inside the feed-forward layer, behind the activation."""
    init: InitConfig = InitConfig()
    """How parameters are drawn."""
    init_from: str | None = None
    """A checkpoint whose weights start this run; optimizer, schedules and data start afresh."""

    @property
    def has_decoder_stack(self) -> bool:
        """Whether an encoder feeds a decoder."""
        return self.architecture in ("bart", "t5")

    @property
    def is_encoder_only(self) -> bool:
        """Whether every token sees every other, and masked ones are predicted."""
        return self.architecture in ("bert", "roberta")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a gate, and so two input matrices."""
        return self.activation in ("swiglu", "geglu")

    @property
    def ffn_size(self) -> int:
        """Resolved width of the feed-forward layer."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Resolved number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Resolved width of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
