"""What the model is trained to predict: one class for each objective, told apart by `name`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from lmscale.config.base import Section

Share = Annotated[float, Field(ge=0, le=1)]


class CausalLMConfig(Section):
    """Each token from those before it."""

    name: Literal["causal_lm"] = "causal_lm"
    """causal_lm: each token from those before it."""
    prefix_lm: bool = False
    """Let every token of a prefix, of random length in each sample, see the whole prefix; what follows it is predicted."""


class BertConfig(Section):
    """Masked tokens of a pair of segments, and whether the second follows the first."""

    name: Literal["bert"] = "bert"
    """bert: masked tokens of a pair of segments, and whether the second follows the first."""
    masked_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens to predict, special ones counted in."""
    max_predictions: int | None = Field(None, gt=0)
    """Most tokens to predict in a sample; left out, masked_share of data.seq_length, rounded up."""
    whole_words: bool = False
    """Mask all pieces of a word or none."""
    short_share: Share = 0.1
    """Share of documents that are cut into samples of a random, shorter length."""
    static_copies: int = Field(0, ge=0)
    """Cut and mask the corpus this many times and then repeat the same samples, as the original's duplication (10) did;
    0 draws anew in each epoch."""


class RobertaConfig(Section):
    """Masked tokens, drawn anew in each epoch."""

    name: Literal["roberta"] = "roberta"
    """roberta: masked tokens, drawn anew in each epoch."""
    packing: Literal["full_sentences", "doc_sentences", "blocks", "sentences"] = "full_sentences"
    """full_sentences: whole sentences, also across documents; doc_sentences: of one document only; blocks: of equal
    length, wherever they cut; sentences: one in each sample."""
    masked_share: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens to predict, special ones counted in."""
    kept_share: Share = 0.1
    """Share of these that the model reads as they are."""
    random_share: Share = 0.1
    """Share of these that it reads as a random token."""
    whole_words: bool = False
    """Mask all pieces of a word or none."""


class BartConfig(Section):
    """The text itself from a noised copy."""

    name: Literal["bart"] = "bart"
    """bart: the text itself from a noised copy."""
    preset: Literal["bart_paper", "bart_released"] | None = None
    """bart_paper: span_lambda 3.0, random_share 0; bart_released: 3.5 and 0.1, as the published model was trained."""
    packing: Literal["full_sentences", "doc_sentences", "blocks", "sentences"] = "full_sentences"
    """As of roberta."""
    masking: Literal["spans", "words", "tokens"] = "spans"
    """spans: of words, of Poisson length (text infilling); words: single ones; tokens: single ones."""
    masked_share: Share = 0.3
    """Share of the words (tokens) that is noised."""
    span_lambda: float = Field(3.0, gt=0, le=64)
    """Mean length of spans, in words; their table of lengths ends at 127."""
    replacement: Literal["one", "each", "none"] = "one"
    """What a noised span becomes: one mask, a mask for each of its tokens, or nothing (deletion)."""
    random_share: Share = 0.0
    """Share of masks that are a random token instead."""
    permuted_share: Share = 1.0
    """Share of the sentences that change places."""
    rotated_share: Share = 0.0
    """Share of the samples that are rotated to begin with a random token."""
    inserted_share: Share = 0.0
    """Masks put between tokens, as a share of the tokens."""
    full_stop: str = "."
    """The piece of the tokenizer that ends a sentence; read with permuted_share above 0."""


class T5Config(Section):
    """Spans of the text from what is left of it."""

    name: Literal["t5"] = "t5"
    """t5: spans of the text from what is left of it, each marked by a sentinel."""
    noise: Literal["spans", "iid", "bert", "prefix_lm", "deshuffle"] = "spans"
    """spans: random spans, the published models' objective; iid: single tokens, neighbours merged; bert: the whole text
    from a copy with tokens masked or replaced; prefix_lm: the end of a text from its beginning; deshuffle: the text from
    its shuffled tokens."""
    density: float = Field(0.15, gt=0, lt=1)
    """Share of the tokens that is noise; prefix_lm and deshuffle do without."""
    mean_span: float = Field(3.0, ge=1)
    """Mean length of a span; read with noise: spans only."""
    random_share: Share = 0.1
    """Share of the noise that is replaced by a random token in the place of the mask; read with noise: bert only."""
    z_loss: float = Field(1.0e-4, ge=0)
    """Weight of the square of the log normalizer, added to the training loss of each token; 0 leaves it out."""
    loss_denominator: Literal["tokens", "padded"] = "tokens"
    """tokens: the loss is a mean over target tokens; padded: over all places of the targets, as the original divides."""


class TextToTextConfig(Section):
    """The target of an example from its input."""

    name: Literal["text_to_text"] = "text_to_text"
    """text_to_text: the target of an example from its input; corpora of lmscale tokenize --pair."""
    packed: bool = True
    """Put as many examples into a sample as fit, which do not see each other; false: one in each."""
    z_loss: float = Field(1.0e-4, ge=0)
    """As of t5."""
    loss_denominator: Literal["tokens", "padded"] = "tokens"
    """As of t5."""


def _name(section: Any) -> str:
    """Tell which of the classes a mapping, or an object, is of."""
    return str(section.get("name", "causal_lm") if isinstance(section, dict) else getattr(section, "name", ""))


ObjectiveConfig = Annotated[
    Annotated[CausalLMConfig, Tag("causal_lm")]
    | Annotated[BertConfig, Tag("bert")]
    | Annotated[RobertaConfig, Tag("roberta")]
    | Annotated[BartConfig, Tag("bart")]
    | Annotated[T5Config, Tag("t5")]
    | Annotated[TextToTextConfig, Tag("text_to_text")],
    Discriminator(_name),
]

OBJECTIVES_OF = {
    "gpt": ("causal_lm",),
    "bert": ("bert",),
    "roberta": ("roberta",),
    "bart": ("bart",),
    "t5": ("t5", "text_to_text"),
}
"""The objectives of each architecture, its default first."""


def default_objective(architecture: str) -> ObjectiveConfig:
    """Return an architecture's own objective, as its paper set it."""
    kinds = (CausalLMConfig, BertConfig, RobertaConfig, BartConfig, T5Config)
    return next(kind() for kind in kinds if kind.model_fields["name"].default == OBJECTIVES_OF[architecture][0])


def is_packed(objective: ObjectiveConfig) -> bool:
    """Tell whether samples hold several examples of inputs and targets."""
    return isinstance(objective, TextToTextConfig) and objective.packed


def max_predictions(objective: BertConfig | RobertaConfig, seq_length: int) -> int:
    """Return the places for predictions in a sample: the most tokens that are ever masked in it.

    RoBERTa rounds masked_share x length up or down at random, so that one more than its floor can occur.
    """
    if isinstance(objective, BertConfig) and objective.max_predictions is not None:
        return objective.max_predictions
    return math.ceil(objective.masked_share * seq_length)
