"""Metrics against values worked out by hand, and against the libraries."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.errors import ConfigError
from lmscale.tasks import metrics


@pytest.mark.parametrize(
    ("tags", "spans"),
    [
        ("O O", set()),
        ("B-X I-X O B-Y", {(0, 2, "X"), (3, 4, "Y")}),
        ("B-X B-X", {(0, 1, "X"), (1, 2, "X")}),
        ("I-X I-X O I-Y", {(0, 2, "X"), (3, 4, "Y")}),  # a span may begin with I
        ("B-X I-Y I-Y", {(0, 1, "X"), (1, 3, "Y")}),  # another kind begins another span
        ("O I-X B-X I-X", {(1, 2, "X"), (2, 4, "X")}),
    ],
)
def test_spans_are_those_of_seqeval(tags, spans):
    assert metrics.spans_of(tags.split()) == spans


def test_span_scores_count_all_texts_together():
    gold = [["B-X", "I-X", "O", "B-Y"], ["B-X", "O"]]
    ours = [["B-X", "I-X", "O", "B-X"], ["B-X", "I-X"]]
    labels = ("B-X", "B-Y", "I-X", "I-Y", "O")
    found = metrics.token_classification(gold, ours, labels)
    # One of our three spans is right, of three there are.
    assert found["span_precision"] == found["span_recall"] == found["span_f1"] == pytest.approx(1 / 3)
    # Words: 4 of 6 are right; of classes other than O, 3 are right, 5 are ours, 4 are theirs.
    assert found["token_accuracy"] == pytest.approx(4 / 6)
    assert found["token_f1"] == pytest.approx(2 * 3 / (5 + 4))


def test_spans_of_nothing_score_nothing():
    found = metrics.token_classification([["O"]], [["O"]], ("B-X", "O"))
    assert found["span_f1"] == 0.0
    assert found["token_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("labels", "is_bio"), [(("B-X", "I-X", "O"), True), (("B-X",), True), (("NOUN",), False), (("B-X", "S-X"), False)]
)
def test_classes_of_spans_are_known_by_their_form(labels, is_bio):
    assert metrics.is_bio(labels) == is_bio


@pytest.mark.parametrize(
    ("text", "normal"),
    [("The  Cat's mat.", "cats mat"), ("a-b", "ab"), ("An apple, a day", "apple day"), ("theatre", "theatre")],
)
def test_answers_are_normalized_as_by_squad(text, normal):
    assert metrics.normalized(text) == normal


@pytest.mark.parametrize(
    ("text", "reference", "f1"),
    [
        ("the cat", "cat", 1.0),
        ("old cat", "cat", 2 / 3),
        ("dog", "cat", 0.0),
        ("", "", 1.0),
        ("the", "", 1.0),
        ("x", "", 0.0),
        ("cat cat dog", "cat dog dog", 2 / 3),
    ],
)
def test_words_are_compared_as_by_squad(text, reference, f1):
    assert metrics.word_f1(text, reference) == pytest.approx(f1)


def test_the_nearest_reference_counts():
    found = metrics.question_answering(["old cat", "x"], [["dog", "cat"], ["x y", "X."]])
    assert found == pytest.approx({"f1": (2 / 3 + 1) / 2, "exact_match": 0.5})


def test_generation_is_measured_by_the_libraries():
    texts, references = (
        ["the cat sat on the mat today", "birds sang"],
        [["the cat sat on a mat today"], ["a dog", "birds sang"]],
    )
    found = metrics.generation(texts, references)
    # ROUGE-L of the first: 6 of 7 words in order, either way. ROUGE-2: 4 of 6 pairs.
    assert found["rougeL"] == found["rouge1"] == pytest.approx((6 / 7 + 1) / 2)
    assert found["rouge2"] == pytest.approx((4 / 6 + 1) / 2)
    # BLEU: precisions 8/9, 5/7, 2/5 and 1/4 of 1- to 4-grams; 9 words of ours and 9 of the nearest references.
    assert found["bleu"] == pytest.approx((8 / 9 * 5 / 7 * 2 / 5 * 1 / 4) ** 0.25)


def test_classes_are_measured_by_hand_made_tables():
    gold, ours = np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 0])
    found = metrics.classification(gold, ours, 2)
    assert found["accuracy"] == pytest.approx(3 / 5)
    assert found["f1"] == pytest.approx(2 * 2 / (3 + 3))
    assert found["macro_f1"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    # (2 x 1 - 1 x 1) / sqrt(3 x 3 x 2 x 2)
    assert found["matthews"] == pytest.approx(1 / 6)
    assert "f1" not in metrics.classification(gold, ours, 3)


def test_correlations_of_equal_numbers_are_nothing():
    assert metrics.regression(np.ones(3), np.arange(3.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert metrics.regression(np.arange(3.0), np.zeros(3)) == {"pearson": 0.0, "spearman": 0.0}


@given(st.lists(st.tuples(st.integers(-99, 99), st.integers(-99, 99)), min_size=3, max_size=20))
def test_pearson_is_the_formula(pairs):
    x, y = np.array(pairs, np.float64).T
    if np.ptp(x) and np.ptp(y):
        assert metrics.regression(x, y)["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)


def test_numbers_are_read_from_texts():
    assert metrics.numbers_of(["3", " -1.5", "x", "nan", ""], 9.0).tolist() == [3.0, -1.5, 9.0, 9.0, 9.0]


def test_a_missing_library_is_found_before_a_rank_starts(monkeypatch):
    metrics.check_libraries("generation")
    metrics.check_libraries("extractive_qa")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    metrics.check_libraries("extractive_qa")
    with pytest.raises(ConfigError, match=r"needs sacrebleu, which is not installed; pip install 'lmscale\[tasks\]'"):
        metrics.check_libraries("generation")


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ConfigError, match=r"needs sklearn, which is not installed; pip install 'lmscale\[tasks\]'"):
        metrics.classification(np.zeros(1), np.zeros(1), 2)
