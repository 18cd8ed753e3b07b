"""Rows of bert, roberta and gpt with a head: what stands where, and what counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.batch import FIELDS
from lmscale.errors import ConfigError, DataError
from lmscale.tasks.build import build_task
from lmscale.tasks.head_rows import shortened

PAIRS = [
    {"premise": "the cat sat", "hypothesis": "a dog", "label": 2},
    {"premise": "an old dog run home in rain " * 6, "hypothesis": "birds sang " * 20, "label": 10},
    {"premise": "mat", "hypothesis": "the old cat sat on a mat", "label": 2},
]
COLUMNS = {"text": "premise", "pair": "hypothesis"}
WIDTH = 48


def built(make_run, tokenizer, *args, room=0, **keys):
    return build_task(make_run(*args, **keys), tokenizer, room)


def check_fields(arrays) -> None:
    dtypes = {field.name: field.dtype for field in FIELDS}
    assert {name: str(array.dtype) for name, array in arrays.items()} == {name: dtypes[name] for name in arrays}


def texts_of(arrays, tokenizer):
    """The ids of each row without padding."""
    return [row[ids >= 0].tolist() for row, ids in zip(arrays["tokens"], arrays["document_ids"], strict=True)]


def test_bert_reads_a_pair_between_cls_and_sep_with_two_token_types(make_run, tokenizer):
    task = built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS)
    assert (task.head, task.num_outputs, task.labels, task.metric) == ("classes", 2, ("2", "10"), "accuracy")
    arrays = task.splits["train"].arrays(np.array([0, 1, 2]))
    check_fields(arrays)
    first, second = tokenizer.encode("the cat sat"), tokenizer.encode("a dog")
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    row = [cls, *first, sep, *second, sep]
    assert texts_of(arrays, tokenizer)[0] == row
    assert arrays["tokens"][0, len(row) :].tolist() == [tokenizer.pad_id] * (WIDTH - len(row))
    assert arrays["token_types"][0].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1) + [0] * (
        WIDTH - len(row)
    )
    assert arrays["labels"].tolist() == [[0], [1], [0]]
    assert arrays["loss_mask"].tolist() == [[1.0]] * 3


def test_a_long_pair_loses_the_end_of_the_longer_half_and_fills_its_row(make_run, tokenizer):
    task = built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS)
    row = texts_of(task.splits["train"].arrays(np.array([1])), tokenizer)[0]
    assert len(row) == WIDTH
    border = row.index(tokenizer.sep_id)
    assert row[1:border] == tokenizer.encode(PAIRS[1]["premise"])[: border - 1]
    assert row[border + 1 : -1] == tokenizer.encode(PAIRS[1]["hypothesis"])[: WIDTH - border - 2]
    assert abs((border - 1) - (WIDTH - border - 2)) <= 1


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1), st.integers(2, 40))
def test_pairs_are_shortened_as_if_token_by_token_from_the_longer(pairs, most):
    first, second = np.array(pairs).T
    cut = np.stack(shortened(first, second, most), axis=1)
    for (a, b), ours in zip(pairs, cut.tolist(), strict=True):
        while a + b > most:
            a, b = (a - 1, b) if a > b else (a, b - 1)
        assert ours == [a, b]


def test_roberta_puts_two_ends_between_a_pair_and_has_no_token_types(make_run, tokenizer):
    task = built(make_run, tokenizer, "roberta", "classification", PAIRS, columns=COLUMNS)
    arrays = task.splits["train"].arrays(np.array([0]))
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    row = [bos, *tokenizer.encode("the cat sat"), eos, eos, *tokenizer.encode("a dog"), eos]
    assert texts_of(arrays, tokenizer) == [row]
    assert "token_types" not in arrays


def test_gpt_with_a_head_ends_with_the_token_that_the_head_reads(make_run, tokenizer):
    lines = [{"text": "the cat", "target": 1.5}, {"text": "a dog", "target": "-2"}]
    task = built(make_run, tokenizer, "gpt", "regression", lines, output="head")
    assert (task.head, task.num_outputs, task.labels, task.metric) == ("value", 1, (), "pearson")
    arrays = task.splits["train"].arrays(np.array([1, 0]))
    check_fields(arrays)
    assert texts_of(arrays, tokenizer) == [[*tokenizer.encode(text), tokenizer.eos_id] for text in ("a dog", "the cat")]
    assert arrays["targets"].tolist() == [[-2.0], [1.5]]
    assert arrays["loss_mask"].tolist() == [[1.0], [1.0]]


def test_room_shortens_the_rows_and_filler_rows_do_not_count(make_run, tokenizer):
    task = built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS, room=8)
    arrays = task.splits["train"].arrays(np.array([1, -1]))
    assert arrays["tokens"].shape == (2, WIDTH - 8)
    assert arrays["loss_mask"].tolist() == [[1.0], [0.0]]
    with pytest.raises(IndexError, match="there are 3 rows"):
        task.splits["train"].arrays(np.array([3]))


def test_rows_that_leave_no_room_are_refused(make_run, tokenizer):
    with pytest.raises(ConfigError, match=r"data.seq_length: leaves 4 places in a row.*give at least 1 more"):
        built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS, seq_length=4)
    with pytest.raises(ConfigError, match=r"data.seq_length = 48: leaves no place behind the 48"):
        built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS, room=48)


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_the_same_rows_are_the_same_in_any_batch(make_run, tokenizer, architecture):
    split = built(make_run, tokenizer, architecture, "classification", PAIRS, columns=COLUMNS).splits["train"]
    whole = split.arrays(np.array([0, 1, 2]))
    for row in range(3):
        for name, array in split.arrays(np.array([row])).items():
            assert np.array_equal(array[0], whole[name][row])


SENTENCES = [
    {"tokens": ["the", "cat", "sat", "home"], "tags": ["O", "B-PET", "I-PET", "O"]},
    {"tokens": ["seven"] * 60, "tags": ["B-NUM", "I-NUM"] * 30},
    {"tokens": ["dog"], "tags": ["B-PET"]},
]


@pytest.mark.parametrize(("architecture", "first"), [("bert", "cls_id"), ("roberta", "bos_id")])
def test_each_word_counts_once_at_its_first_piece(make_run, tokenizer, architecture, first):
    task = built(make_run, tokenizer, architecture, "token_classification", SENTENCES)
    assert (task.head, task.num_outputs, task.metric) == ("token_classes", 5, "span_f1")
    assert task.labels == ("B-NUM", "B-PET", "I-NUM", "I-PET", "O")
    split = task.splits["train"]
    assert split.num_rows > split.num_examples == 3  # the long one takes several rows
    arrays = split.arrays(np.arange(split.num_rows))
    check_fields(arrays)
    assert arrays["labels"].shape == arrays["loss_mask"].shape == (split.num_rows, WIDTH)
    pieces = [tokenizer.encode(word) for word in ("the", " cat", " sat", " home")]
    assert texts_of(arrays, tokenizer)[0][:-1] == [
        getattr(tokenizer, first),
        *(piece for word in pieces for piece in word),
    ]
    places = np.cumsum([1, *map(len, pieces[:-1])])
    assert np.flatnonzero(arrays["loss_mask"][0]).tolist() == places.tolist()
    learned = arrays["labels"][arrays["loss_mask"] > 0]
    gold = [tag for line in SENTENCES for tag in line["tags"]]
    assert [task.labels[number] for number in learned] == gold


def test_a_batch_of_word_rows_in_any_order_is_the_rows_one_by_one(make_run, tokenizer):
    split = built(make_run, tokenizer, "bert", "token_classification", SENTENCES).splits["train"]
    order = np.arange(split.num_rows)[::-1]
    mixed = split.arrays(order)
    for place, row in enumerate(order):
        for name, array in split.arrays(np.array([row])).items():
            assert np.array_equal(array[0], mixed[name][place])


def test_perfect_logits_give_perfect_metrics_and_spans_are_counted(make_run, tokenizer):
    task = built(make_run, tokenizer, "bert", "token_classification", SENTENCES)
    split = task.splits["train"]
    labels = split.arrays(np.arange(split.num_rows))["labels"]
    logits = np.eye(len(task.labels), dtype=np.float32)[labels]
    assert task.metrics("train", logits) == dict.fromkeys(
        ("token_accuracy", "token_f1", "span_precision", "span_recall", "span_f1"), 1.0
    )
    logits[..., task.labels.index("O")] = 2.0
    assert task.metrics(split, logits)["span_f1"] == 0.0
    with pytest.raises(ValueError, match="predictions have shape"):
        task.metrics(split, logits[:, 1:])


def test_classes_without_spans_are_measured_by_word(make_run, tokenizer):
    lines = [{"tokens": ["cat", "sat"], "tags": ["NOUN", "VERB"]}, {"tokens": ["dog"], "tags": ["NOUN"]}]
    task = built(make_run, tokenizer, "bert", "token_classification", lines)
    assert task.metric == "token_f1"
    logits = np.zeros((2, WIDTH, 2), np.float32)  # all are the first class, NOUN
    assert task.metrics("train", logits) == pytest.approx({"token_accuracy": 2 / 3, "token_f1": 0.4})


def test_class_and_value_predictions_are_compared_in_the_order_of_the_file(make_run, tokenizer):
    task = built(make_run, tokenizer, "bert", "classification", PAIRS, columns=COLUMNS)
    logits = np.array([[[1, 0]], [[0, 1]], [[0, 1]]], np.float32)
    found = task.metrics("train", logits)
    # Of two classes, "10" is the positive one: found twice, once rightly. Of "2" one of two is found.
    assert found == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 3, "macro_f1": 2 / 3, "matthews": 0.5})
    lines = [{"text": "cat", "target": value} for value in (1, 2, 4)]
    task = built(make_run, tokenizer, "bert", "regression", lines)
    values = np.array([1, 3, 2], np.float32).reshape(3, 1, 1)
    # Pearson: deviations (-4, -1, 5)/3 and (-1, 1, 0): 3/3 / sqrt(42/9 * 2) ; ranks (1,2,3) and (1,3,2): 1/2.
    assert task.metrics("train", values) == pytest.approx({"pearson": 1 / np.sqrt(42 / 9 * 2), "spearman": 0.5})


def test_labels_of_dev_that_training_lacks_are_refused_by_line(make_run, tokenizer):
    dev = [{"text": "a", "label": "x"}, {"text": "a", "label": "z"}]
    train = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
    with pytest.raises(DataError, match=r"dev.jsonl:2: label 'z' is not among those of task.train; known are x, y"):
        built(make_run, tokenizer, "bert", "classification", train, dev)
    listed = built(make_run, tokenizer, "bert", "classification", train, dev, labels=["z", "y", "x"])
    assert listed.labels == ("z", "y", "x")
