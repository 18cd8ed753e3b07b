"""Extractive question answering: windows, places of answers, the best span, characters."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lmscale.errors import ConfigError, DataError
from lmscale.tasks.build import build_task
from lmscale.tasks.head_rows import Frame
from lmscale.tasks.items import Question
from lmscale.tasks.span_rows import SpanRows, best_span

WIDTH = 48
LONG = " ".join(f"the old dog ({number}) sat on a mat." for number in range(20))


def line(context, answer, question="the cat?"):
    answers = (
        {"text": [answer], "answer_start": [context.index(answer)]} if answer else {"text": [], "answer_start": []}
    )
    return {"question": question, "context": context, "answers": answers}


LINES = [line("a cat saw (seven) trees.", "seven"), line(LONG, "(17) sat"), line("no rain", None)]


def perfect(split):
    """Scores that are high at the labels of each row; the first token is least where a row holds the answer."""
    labels = split.arrays(np.arange(split.num_rows))["labels"]
    scores = np.zeros((split.num_rows, 2, WIDTH), np.float32)
    rows = np.arange(split.num_rows)
    scores[rows, 0, labels[:, 0]] = scores[rows, 1, labels[:, 1]] = 5.0
    return scores


@pytest.mark.parametrize("architecture", ["bert", "roberta"])
def test_labels_lead_back_to_the_characters_of_the_answer(make_run, tokenizer, architecture):
    task = build_task(make_run(architecture, "extractive_qa", LINES), tokenizer)
    assert (task.head, task.num_outputs, task.metric) == ("span", 2, "f1")
    split = task.splits["train"]
    arrays = split.arrays(np.arange(split.num_rows))
    assert arrays["labels"].shape == arrays["loss_mask"].shape == (split.num_rows, 2)
    first, last = arrays["labels"][0]
    assert tokenizer.decode(arrays["tokens"][0, first : last + 1].tolist()).strip() == "seven"
    assert (arrays["labels"][-1] == 0).all()  # without an answer
    assert task.metrics(split, perfect(split)) == {"f1": 1.0, "exact_match": 1.0}
    assert split.references == [["seven"], ["(17) sat"], []]


def test_the_answer_is_at_the_first_token_in_windows_that_do_not_hold_it(make_run, tokenizer):
    split = build_task(make_run("bert", "extractive_qa", LINES), tokenizer).splits["train"]
    labels = split.arrays(np.arange(split.num_rows))["labels"]
    holds = [row for row in range(1, split.num_rows - 1) if labels[row, 1]]
    assert 1 <= len(holds) < split.num_rows - 2
    arrays = split.arrays(np.array(holds))
    for row, (first, last) in zip(arrays["tokens"], arrays["labels"], strict=True):
        assert tokenizer.decode(row[first : last + 1].tolist()).strip() == "(17) sat"


@given(st.integers(1, 90), st.integers(0, 30), st.integers(24, 60), st.integers(1, 6))
def test_windows_cover_the_context_in_steps(tokenizer, num_words, question_words, width, step):
    context = " ".join(["cat", "dog", "mat"][number % 3] + str(number) for number in range(num_words))
    item = Question("x:1", " ".join(["who"] * (question_words + 1)), context, [])
    frame = Frame.of("roberta", tokenizer, width)
    config = _Task(step)
    rows = SpanRows([item], tokenizer, frame, config)
    made = rows.make(np.arange(rows.num_rows))
    pieces = {}
    for number in range(rows.num_rows):
        size = int(rows._behind[number] - rows._starts[number])
        offset = int(rows.offsets[number])
        for place in range(size):
            pieces.setdefault(int(rows._starts[number]) + place, set()).add(int(made["tokens"][number, offset + place]))
        assert made["tokens"][number, offset + size] == tokenizer.eos_id
        assert number == 0 or rows._starts[number] - rows._starts[number - 1] == step
    whole = rows._contexts[0].pieces
    assert sorted(pieces) == list(range(len(whole)))
    assert all(pieces[number] == {piece} for number, piece in enumerate(whole))


class _Task:
    max_answer_tokens = None

    def __init__(self, step):
        self.window_step = step


@given(
    hnp.arrays(np.float32, st.integers(1, 12), elements=st.integers(-5, 5)),
    st.integers(1, 14),
    st.randoms(use_true_random=False),
)
def test_the_best_span_is_that_of_trying_all(firsts, longest, random):
    lasts = np.array([random.randint(-5, 5) for _ in firsts], np.float32)
    score, first, last = best_span(firsts, lasts, longest)
    every = [firsts[i] + lasts[j] for i in range(len(firsts)) for j in range(i, min(len(firsts), i + longest))]
    assert score == max(every) == firsts[first] + lasts[last]
    assert 0 <= last - first < longest


def test_the_best_window_wins_and_places_outside_of_the_context_never_do(make_run, tokenizer):
    task = build_task(make_run("bert", "extractive_qa", LINES[:2]), tokenizer)
    split = task.splits["train"]
    scores = perfect(split)
    scores[:, :, 0] += 50.0  # no question lacks an answer, so that the first token counts for nothing
    assert task.metrics(split, scores)["exact_match"] == 1.0
    answers = split.gold.answers(scores, may_be_absent=False)
    assert answers == ["seven", "(17) sat"]
    scores[0, :, 5:] = -9.0
    assert task.metrics(split, scores)["exact_match"] == 0.5


def test_no_answer_wins_where_it_scores_higher_and_training_has_such_questions(make_run, tokenizer):
    task = build_task(make_run("bert", "extractive_qa", LINES), tokenizer)
    split = task.splits["train"]
    scores = perfect(split)
    scores[:, :, 0] = 9.0
    assert task.metrics(split, scores) == pytest.approx({"f1": 1 / 3, "exact_match": 1 / 3})


def test_a_window_that_cuts_the_answer_does_not_hold_it(make_run, tokenizer):
    task = build_task(make_run("bert", "extractive_qa", [LINES[1]], window_step=1), tokenizer)
    split = task.splits["train"]
    rows, arrays = split.gold, split.arrays(np.arange(split.num_rows))
    context = rows._contexts[0]
    assert tokenizer.decode(context.pieces[context.first : context.last + 1]).strip() == "(17) sat"
    assert context.last > context.first + 1  # so that some windows hold only a part of it
    for row, (first, last) in enumerate(arrays["labels"]):
        is_whole = rows._starts[row] <= context.first and context.last + 1 <= rows._behind[row]
        assert (last > 0) == is_whole
        if is_whole:
            assert arrays["tokens"][row, first : last + 1].tolist() == context.pieces[context.first : context.last + 1]


def test_answers_that_do_not_stand_there_and_steps_that_skip_are_refused(make_run, tokenizer):
    wrong = {**LINES[0], "answers": {"text": ["seven"], "answer_start": [3]}}
    with pytest.raises(
        DataError, match=r"train.jsonl:2: column 'answers' says that 'seven' begins at 3, where there is"
    ):
        build_task(make_run("bert", "extractive_qa", [LINES[0], wrong]), tokenizer)
    with pytest.raises(ConfigError, match=r"task.window_step = 47: leaves pieces out between windows of"):
        build_task(make_run("bert", "extractive_qa", LINES, window_step=47), tokenizer)


def test_answers_as_of_the_original_files_are_read_too(make_run, tokenizer):
    listed = {**LINES[0], "answers": [{"text": "seven", "answer_start": 11}, {"text": "(seven)", "answer_start": 10}]}
    split = build_task(make_run("roberta", "extractive_qa", [listed]), tokenizer).splits["train"]
    assert split.references == [["seven", "(seven)"]]
