"""How good predictions are: each metric the higher the better, 1 at best.

scikit-learn, scipy, sacrebleu and rouge-score compute what they are known for; they come with lmscale[tasks] and are
imported where they are used.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmscale.errors import ConfigError
from lmscale.tasks.texts import Ints

Values = NDArray[np.float64]
Texts = Sequence[str]
References = Sequence[Sequence[str]]


def library(name: str) -> Any:
    """Import a library of lmscale[tasks].

    Raises:
        ConfigError: if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise _missing(name) from None


_LIBRARIES: dict[str, tuple[str, ...]] = {
    "classification": ("sklearn",),
    "regression": ("scipy",),
    "token_classification": ("sklearn",),
    "generation": ("sacrebleu", "rouge_score"),
}
"""By kind of task; the others are measured by our own lines."""


def check_libraries(kind: str) -> None:
    """Check that what measures a kind of task is installed, without importing it.

    Raises:
        ConfigError: if it is not.
    """
    for name in _LIBRARIES.get(kind, ()):
        if importlib.util.find_spec(name) is None:
            raise _missing(name)


def _missing(name: str) -> ConfigError:
    return ConfigError(
        f"needs {name.partition('.')[0]}, which is not installed",
        field="task.metric",
        remedy="pip install 'lmscale[tasks]'",
    )


def classification(gold: Ints, predicted: Ints, num_labels: int) -> dict[str, float]:
    """Return accuracy, macro F1 over the classes that occur, Matthews, and, of two classes, F1 of the second."""
    metrics = library("sklearn.metrics")
    found = {
        "accuracy": metrics.accuracy_score(gold, predicted),
        "macro_f1": metrics.f1_score(gold, predicted, average="macro", zero_division=0),
        "matthews": metrics.matthews_corrcoef(gold, predicted),
    }
    if num_labels == 2:
        found["f1"] = metrics.f1_score(gold, predicted, pos_label=1, average="binary", zero_division=0)
    return {name: float(value) for name, value in found.items()}


def regression(gold: Values, predicted: Values) -> dict[str, float]:
    """Return Pearson's and Spearman's correlation; 0 where all of either are equal."""
    if np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return {"pearson": 0.0, "spearman": 0.0}
    stats = library("scipy.stats")
    return {
        "pearson": float(stats.pearsonr(gold, predicted).statistic),
        "spearman": float(stats.spearmanr(gold, predicted).statistic),
    }


def is_bio(labels: Sequence[str]) -> bool:
    """Tell whether classes mark spans: B-X begins one, I-X is inside of one, O is of none."""
    return any(label.startswith("B-") for label in labels) and all(
        label == "O" or re.match("[BI]-.", label) for label in labels
    )


def spans_of(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """Return the spans of a text, as (first word, word behind, kind).

    B-X begins a span; so does I-X behind O, behind another kind, or at the begin. This is the default of seqeval, and of
    the script of CoNLL-2000.
    """
    spans: set[tuple[int, int, str]] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        goes_on = bool(kind) and tag == f"I-{kind}"
        if kind and not goes_on:
            spans.add((start, place, kind))
            kind = ""
        if not kind and tag != "O":
            start, kind = place, tag[2:]
    return spans


def token_classification(
    gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]], labels: Sequence[str]
) -> dict[str, float]:
    """Return the share of right words; F1 over words; and, where classes mark spans, precision, recall and F1 of spans.

    F1 over words counts all classes but O together; where there is no O, it is the mean of the classes' F1. F1 of spans
    counts those of all texts together; one is right if its words and its kind are.
    """
    metrics = library("sklearn.metrics")
    flat_gold = [tag for tags in gold for tag in tags]
    flat = [tag for tags in predicted for tag in tags]
    found = {"token_accuracy": float(metrics.accuracy_score(flat_gold, flat))}
    counted = [label for label in labels if label != "O"]
    if len(counted) < len(labels):
        f1 = metrics.f1_score(flat_gold, flat, labels=counted, average="micro", zero_division=0)
    else:
        f1 = metrics.f1_score(flat_gold, flat, average="macro", zero_division=0)
    found["token_f1"] = float(f1)
    if is_bio(labels):
        pairs = [(spans_of(ours), spans_of(theirs)) for ours, theirs in zip(predicted, gold, strict=True)]
        right = sum(len(ours & theirs) for ours, theirs in pairs)
        num_ours, num_theirs = sum(len(ours) for ours, _ in pairs), sum(len(theirs) for _, theirs in pairs)
        found["span_precision"] = right / num_ours if num_ours else 0.0
        found["span_recall"] = right / num_theirs if num_theirs else 0.0
        found["span_f1"] = 2 * right / (num_ours + num_theirs) if right else 0.0
    return found


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower the case, and leave out punctuation, articles and all spaces but one between words, in this order.

    Source: the evaluation script of SQuAD (Rajpurkar et al. 2016, arXiv:1606.05250, sec. 6.1).
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split())


def word_f1(text: str, reference: str) -> float:
    """Return F1 of the words that two normalized texts share; of empty ones, whether both are."""
    ours, theirs = normalized(text).split(), normalized(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def question_answering(texts: Texts, references: References) -> dict[str, float]:
    """Return the mean of word F1 and the share of exact matches, each against the nearest reference, normalized.

    A question without an answer has the reference "".
    """
    return {
        "f1": _mean([max(word_f1(text, each) for each in right) for text, right in _pairs(texts, references)]),
        "exact_match": _mean(
            [
                float(any(normalized(text) == normalized(each) for each in right))
                for text, right in _pairs(texts, references)
            ]
        ),
    }


def generation(texts: Texts, references: References) -> dict[str, float]:
    """Return ROUGE-1, -2 and -L (the mean of F1, stemmed, against the nearest reference), BLEU, and those of answers.

    BLEU is sacrebleu's of the corpus, divided by 100.
    """
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    scores = [scorer.score_multi(list(right), text) for text, right in _pairs(texts, references)]
    found = {name: _mean([score[name].fmeasure for score in scores]) for name in ("rouge1", "rouge2", "rougeL")}
    most = max(len(right) for right in references)
    # sacrebleu takes a list for the first references, one for the second, ...; None where a text has no more.
    columns = [[right[number] if number < len(right) else None for right in references] for number in range(most)]
    found["bleu"] = float(library("sacrebleu").corpus_bleu(list(texts), columns, force=True).score) / 100
    return found | question_answering(texts, references)


def _pairs(texts: Texts, references: References) -> list[tuple[str, Sequence[str]]]:
    return list(zip(texts, references, strict=True))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def numbers_of(texts: Texts, otherwise: float) -> Values:
    """Read numbers from texts, with another in the place of what is none."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            return otherwise
        return number if np.isfinite(number) else otherwise

    return np.array([read(text) for text in texts], np.float64)


def shaped(predictions: Any, *shape: int) -> NDArray[np.float32]:
    """Check the shape of predictions.

    Raises:
        ValueError: if it is another.
    """
    array = np.asarray(predictions, np.float32)
    if array.shape != shape:
        raise ValueError(f"predictions have shape {list(array.shape)}, and those of this split have {list(shape)}")
    return array
