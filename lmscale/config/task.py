"""What a model is adapted to: the files of a task, how their columns become text, and what decides."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmscale.config.base import Section

TaskKind = Literal["classification", "regression", "token_classification", "extractive_qa", "generation"]
HeadKind = Literal["classes", "token_classes", "span", "value"]
Domain = Literal["in", "out"]
Label = bool | int | str


def label_name(label: Label) -> str:
    """Spell a label as files do, where true is JSON's."""
    return str(label).lower() if isinstance(label, bool) else str(label)


class TestSet(Section):
    """One test set."""

    __test__ = False  # no test, though pytest takes the name for one

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    """Its name in metrics and reports."""
    path: str
    """Its file, as of `task.train`."""
    domain: Domain = "in"
    """in: of the training set's domain; out: of another, reported beside it."""


class TaskColumns(Section):
    """The columns of the task's files. Left out, a column has the name of its key, and `pair` and `messages` are not there."""

    text: str | None = None
    """The input, or its first sentence; classification, regression, generation."""
    pair: str | None = None
    """The second sentence, where there are pairs; classification and regression."""
    label: str | None = None
    """The class, a string, number or truth value; classification."""
    target: str | None = None
    """The number to predict, of regression, or the text to write, of generation: a string, or a list of them, of which the
    first is learned and all are references."""
    tokens: str | None = None
    """The words, a list; token_classification."""
    tags: str | None = None
    """The class of each word, a list; token_classification."""
    question: str | None = None
    """The question; extractive_qa."""
    context: str | None = None
    """The text that holds the answer; extractive_qa."""
    answers: str | None = None
    """Answers as of SQuAD: {text: [...], answer_start: [...]}, or a list of {text, answer_start}, the start counted in
    characters of the context; empty where there is none. extractive_qa."""
    entry: str | None = None
    """Whose adaptation a row trains and is predicted with, a name; with adapt.entries above 1. classification, regression and
    generation; it has no default."""
    messages: str | None = None
    """A conversation in the place of text and target: a list of {role, content}; generation. Each turn of the assistant is
    learned."""


class TaskConfig(Section):
    """A task to adapt a model to. Files are JSON lines (.jsonl, also .gz and .zst), .csv or .tsv with a line of names."""

    kind: TaskKind
    """classification: a class for each text or pair; regression: a number; token_classification: a class for each word;
    extractive_qa: the part of a context that answers a question; generation: a text from a text."""
    train: str
    """File of the examples to learn."""
    dev: str | None = None
    """File of the examples that decide: early stopping and the choice between runs."""
    test: list[TestSet] = []
    """Files that are measured at the end, and nothing is decided by."""
    columns: TaskColumns = TaskColumns()
    """Names of their columns."""
    output: Literal["head", "text"] | None = None
    """head: a new head gives the classes, numbers or places; text: the language-model head writes them as words. Left out,
    head for bert and roberta, text for gpt, t5 and bart; gpt takes head too, for classification and regression."""
    template: str | None = None
    """The input as text, with {column} where a column goes and {{ for a brace; output: text only. Left out, each column
    behind its name, as in "premise: {premise} hypothesis: {hypothesis}"; for gpt with the name of what follows."""
    target_template: str | None = None
    """As template, of what is learned: {column} of label, target or answers. Left out, the column alone; for gpt behind a
    space."""
    roles: dict[str, str] | None = None
    """Templates of a conversation's turns, with {content}, by role; with columns.messages only. Left out, "{content}\\n" of
    system, "User: {content}\\n" of user, "Assistant: {content}" of assistant; behind a turn of the assistant comes the
    token that ends a text."""
    labels: list[Label] | None = Field(None, min_length=2)
    """The classes, in order; left out, those of `train`, sorted. classification and token_classification."""
    entries: list[str] | None = Field(None, min_length=2)
    """The names of columns.entry, in the order of the adaptations; left out, those of `train`, sorted."""
    label_words: dict[Label, str] | None = None
    """What stands for a class in text, by class; left out, the class itself. classification with output: text."""
    metric: str | None = None
    """The metric of `dev` that decides, the higher the better: accuracy, macro_f1, f1 (of two classes, that of the second),
    matthews; pearson, spearman; span_f1, token_f1, token_accuracy; f1, exact_match; rouge1, rouge2, rougeL, bleu. Left
    out, the first of the task's kind (span_f1 where the classes are B-X, I-X and O, else token_f1; f1 of extractive_qa,
    rougeL of generation)."""
    patience: int | None = Field(None, gt=0)
    """Evaluations of `dev` without a better metric after which the run stops; left out, it never does."""
    train_limit: int | None = Field(None, gt=0)
    """Examples of `train` that are read, from its begin; left out, all."""
    dev_limit: int | None = Field(None, gt=0)
    """As train_limit, of `dev`."""
    test_limit: int | None = Field(None, gt=0)
    """As train_limit, of each test set."""
    max_new_tokens: int | None = Field(None, gt=0)
    """Most tokens that are written for an example; left out, those of the longest target of `train`. generation, and
    regression and extractive_qa with output: text."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target's probability that is spread over the whole vocabulary in training; generation."""
    packed: bool = False
    """Put several training examples into a row, which do not see one another; output: text of gpt and t5."""
    window_step: int | None = Field(None, gt=0)
    """Tokens from the begin of one window of a long context to the next; left out, half a window. extractive_qa with
    output: head, as the following key."""
    max_answer_tokens: int | None = Field(None, gt=0)
    """Most tokens of an answer that is found; left out, 30."""

    def limit_of(self, split: str) -> int | None:
        """Return the limit of a split: of train, of dev, or of a test set."""
        return {"train": self.train_limit, "dev": self.dev_limit}.get(split, self.test_limit)

    def output_of(self, architecture: str) -> Literal["head", "text"]:
        """Return `output`, or what it is for an architecture where it is left out."""
        return self.output or ("head" if architecture in ("bert", "roberta") else "text")


MAX_ANSWER_TOKENS = 30
"""As of the published code of BERT."""

HEADS: dict[str, HeadKind] = {
    "classification": "classes",
    "regression": "value",
    "token_classification": "token_classes",
    "extractive_qa": "span",
}
"""The head of each kind of task that has one."""

METRICS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
    "token_classification": ("span_f1", "token_f1", "token_accuracy"),
    "extractive_qa": ("f1", "exact_match"),
    "generation": ("rougeL", "rouge1", "rouge2", "bleu", "f1", "exact_match"),
}
"""The metrics that can decide, the default of each kind first."""

COLUMNS_OF: dict[str, tuple[str, ...]] = {
    "classification": ("text", "pair", "label", "entry"),
    "regression": ("text", "pair", "target", "entry"),
    "token_classification": ("tokens", "tags"),
    "extractive_qa": ("question", "context", "answers"),
    "generation": ("text", "target", "messages", "entry"),
}
"""The columns of each kind."""
