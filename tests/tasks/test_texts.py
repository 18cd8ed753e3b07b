"""Rows of text to read and text to write: gpt, t5 and bart; labels compared, text written, conversations, packing."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmscale.errors import ConfigError, DataError
from lmscale.tasks.build import build_task
from lmscale.tasks.text_rows import Layout, pack
from lmscale.tasks.texts import Texts, joined, marked

PAIRS = [
    {"premise": "the cat sat", "hypothesis": "a dog", "label": 0},
    {"premise": "old mat", "hypothesis": "birds sang", "label": 1},
]
NLI = {"columns": {"text": "premise", "pair": "hypothesis"}, "label_words": {0: "yes", 1: "no maybe"}}
WRITTEN = [{"text": f"the cat {number}", "target": ["home", "rain in trees", "yes"][number % 3]} for number in range(7)]
CHAT = [
    {"role": "system", "content": "sat on a mat"},
    {"role": "user", "content": "a dog?"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "the cat?"},
    {"role": "assistant", "content": "no maybe"},
    {"role": "user", "content": "home"},
]
WIDTH = 48


def built(make_run, tokenizer, *args, room=0, **keys):
    return build_task(make_run(*args, **keys), tokenizer, room)


def learned(arrays):
    """The labels of each row that count."""
    return [row[mask > 0].tolist() for row, mask in zip(arrays["labels"], arrays["loss_mask"], strict=True)]


def read(arrays, row=0):
    """The ids that the encoder of a row reads."""
    return arrays["tokens"][row][arrays["document_ids"][row] >= 0].tolist()


def test_gpt_reads_input_and_target_in_one_row_and_learns_the_target_and_its_end(make_run, tokenizer):
    task = built(make_run, tokenizer, "gpt", "classification", PAIRS, **NLI)
    assert (task.head, task.labels, task.compares_labels, task.max_new_tokens) == (None, ("0", "1"), True, 0)
    arrays = task.splits["train"].arrays(np.array([0, 1]))
    text = tokenizer.encode("premise: the cat sat hypothesis: a dog label:")
    target = [*tokenizer.encode(" yes"), tokenizer.eos_id]
    assert arrays["tokens"][0, : len(text) + len(target)].tolist() == text + target
    assert learned(arrays) == [target, [*tokenizer.encode(" no maybe"), tokenizer.eos_id]]
    assert np.array_equal(arrays["tokens"][:, 1:], arrays["labels"][:, :-1])
    assert set(arrays) == {"tokens", "labels", "loss_mask"}


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_encoder_and_decoder_have_their_own_ends(make_run, tokenizer, architecture):
    task = built(make_run, tokenizer, architecture, "classification", PAIRS, **NLI, decoder_seq_length=12)
    arrays = task.splits["train"].arrays(np.array([0]))
    bos, eos, pad = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
    begin = [bos] if architecture == "bart" else []
    text = tokenizer.encode("premise: the cat sat hypothesis: a dog")
    target = [*begin, *tokenizer.encode("yes"), eos]
    assert read(arrays) == [*begin, *text, eos]
    assert learned(arrays) == [target]
    start = eos if architecture == "bart" else pad
    assert arrays["decoder_tokens"][0].tolist() == [start, *target[:-1]] + [pad] * (12 - len(target))
    assert arrays["decoder_document_ids"][0].tolist() == [0] * len(target) + [-1] * (12 - len(target))


@pytest.mark.parametrize("architecture", ["gpt", "t5", "bart"])
def test_candidates_are_each_example_with_each_label(make_run, tokenizer, architecture):
    split = built(make_run, tokenizer, architecture, "classification", PAIRS, **NLI).splits["train"]
    candidates = split.candidates()
    assert (candidates.num_examples, candidates.num_rows) == (2, 4)
    arrays = candidates.arrays(np.arange(4))
    trained = split.arrays(np.array([0, 1]))
    for name, array in trained.items():
        assert np.array_equal(arrays[name][[0, 3]], array)  # example 0 with label 0, example 1 with label 1
    assert learned(arrays) == learned(trained) * 2
    assert candidates.arrays(np.array([-1]))["loss_mask"].sum() == 0


def test_the_label_of_highest_likelihood_is_chosen(make_run, tokenizer):
    task = built(make_run, tokenizer, "t5", "classification", PAIRS, **NLI)
    assert task.metrics("train", np.array([[-1.0, -2.0], [-9.0, -3.0]]))["accuracy"] == 1.0
    assert task.metrics("train", np.array([[-3.0, -2.0], [-9.0, -3.0]]))["accuracy"] == 0.5


def test_templates_put_columns_where_they_say(make_run, tokenizer):
    keys = {"template": "{{nli}} {hypothesis}? {premise}", "target_template": "is {label}!", **NLI}
    task = built(make_run, tokenizer, "t5", "classification", PAIRS, **keys)
    arrays = task.splits["train"].arrays(np.array([1]))
    assert read(arrays) == [*tokenizer.encode("{nli} birds sang? old mat"), tokenizer.eos_id]
    assert learned(arrays) == [[*tokenizer.encode("is no maybe!"), tokenizer.eos_id]]


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        (
            {"template": "{other}"},
            r"task.template = '{other}': names a column 'other' that .*train.jsonl:1 does not have",
        ),
        ({"template": "{premise"}, "task.template = '{premise': is no template"),
        ({"template": "{premise!r}"}, "a place holds the name of a column, and nothing else"),
        ({"template": "{premise} {label}"}, "reads the column that is to be written"),
        ({"target_template": "x"}, "task.target_template = 'x': must have one place, {label}"),
        ({"label_words": {"0": "yes", "1": "yes"}}, "labels '0' and '1' are the same tokens"),
        ({"label_words": {"2": "yes"}}, "task.label_words = '2': is no label among those of task.train"),
        ({"label_words": {"0": " "}}, "task.label_words.0 = ' ': is empty"),
    ],
)
def test_wrong_templates_and_words_are_refused(make_run, tokenizer, keys, rule):
    with pytest.raises(ConfigError, match=rule):
        built(make_run, tokenizer, "t5", "classification", PAIRS, **{**NLI, **keys})


@pytest.mark.parametrize("architecture", ["gpt", "t5", "bart"])
def test_prompts_end_where_the_target_begins(make_run, tokenizer, architecture):
    task = built(make_run, tokenizer, architecture, "generation", WRITTEN)
    assert (task.writes_text, task.metric) == (True, "rougeL")
    split = task.splits["train"]
    prompt = split.prompts()[2]
    text = "text: the cat 2 target:" if architecture == "gpt" else "the cat 2"
    assert prompt == tokenizer.encode(text)
    assert split.references[:2] == [["home"], ["rain in trees"]]
    arrays = split.arrays(np.array([2]))
    begin = 1 if architecture == "bart" else 0
    assert arrays["tokens"][0, begin : begin + len(prompt)].tolist() == prompt
    assert task.max_new_tokens == max(len(row) for row in learned(split.arrays(np.arange(7))))


def test_long_inputs_lose_their_middle_and_keep_how_they_end(make_run, tokenizer):
    long = [{"text": "old dog run " * 40, "target": "home"}]
    task = built(make_run, tokenizer, "gpt", "generation", long)
    arrays = task.splits["train"].arrays(np.array([0]))
    target, tail = learned(arrays)[0], tokenizer.encode(" target:")
    assert arrays["loss_mask"][0, -len(target) :].all()  # the row is full
    before = arrays["tokens"][0, : WIDTH + 1 - len(target)].tolist()
    assert before[-len(tail) :] == tail
    assert before[: -len(tail)] == tokenizer.encode("text: " + long[0]["text"])[: len(before) - len(tail)]
    assert task.splits["train"].prompts() == [before]


@pytest.mark.parametrize(
    ("architecture", "keys", "rule"),
    [
        (
            "gpt",
            {"seq_length": 4},
            r"train.jsonl:2: has a target of \d+ tokens, and rows have room for 4; raise data.seq_",
        ),
        ("t5", {"decoder_seq_length": 3}, r"train.jsonl:2: .*have room for 3; raise data.decoder_seq_length"),
        ("t5", {"seq_length": 1}, r"train.jsonl:1: leaves no room for the input"),
    ],
)
def test_lengths_that_leave_no_room_are_refused_by_line(make_run, tokenizer, architecture, keys, rule):
    lines = [{"text": "cat", "target": "a"}, {"text": "dog", "target": "rain in seven tall trees"}]
    with pytest.raises(DataError, match=rule):
        built(make_run, tokenizer, architecture, "generation", lines, **{"decoder_seq_length": 40, **keys})


def test_room_shortens_gpt_and_the_encoder_not_the_decoder(make_run, tokenizer):
    for architecture in ("gpt", "t5"):
        arrays = (
            built(make_run, tokenizer, architecture, "generation", WRITTEN, room=5)
            .splits["train"]
            .arrays(np.array([0]))
        )
        assert arrays["tokens"].shape == (1, WIDTH - 5)
    assert arrays["decoder_tokens"].shape == (1, WIDTH)
    with pytest.raises(ConfigError, match=r"task.packed = True: puts several examples into a row"):
        built(make_run, tokenizer, "gpt", "generation", WRITTEN, room=5, packed=True)


def test_a_prefix_is_what_comes_before_the_first_token_to_write_of_each_example():
    tokens, marks = Texts.of([[1, 2, 3, 4], [5, 6], [7, 8, 9]]), Texts.of([[0, 0, 1, 1], [0, 1], [0, 1, 0]])
    layout = Layout(10, 0, 0, 0, packed=True, has_prefix=True)
    arrays = layout.arrays((tokens, marks), np.array([0, 2, 3]))
    assert arrays["tokens"].tolist() == [[1, 2, 3, 4, 5, 6, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0, 0, 0, 0, 0]]
    assert arrays["is_prefix"].tolist() == [[1, 1, 0, 0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("architecture", ["gpt", "t5"])
def test_packing_loses_nothing_and_tells_examples_apart(make_run, tokenizer, architecture):
    one_each = built(make_run, tokenizer, architecture, "generation", WRITTEN).splits["train"]
    task = built(make_run, tokenizer, architecture, "generation", WRITTEN, WRITTEN, packed=True)
    packed = task.splits["train"]
    assert packed.num_examples == 7 > packed.num_rows
    assert task.splits["dev"].num_rows == 7
    rows = packed.arrays(np.arange(packed.num_rows))
    lone = one_each.arrays(np.arange(7))
    side = "" if architecture == "gpt" else "decoder_"
    examples = [
        (row, number) for row in range(packed.num_rows) for number in range(rows["document_ids"][row].max() + 1)
    ]
    assert len(examples) == 7
    for example, (row, number) in enumerate(examples):
        places = np.flatnonzero(rows[f"{side}document_ids"][row] == number)
        assert rows[f"{side}positions"][row, places].tolist() == list(range(len(places)))
        counted = lone["loss_mask"][example] > 0
        ours = rows["loss_mask"][row, places] > 0
        assert rows["labels"][row, places][ours].tolist() == lone["labels"][example][counted].tolist()
        size = min(len(places), int(np.flatnonzero(counted)[-1]) + 1)
        assert np.array_equal(rows[f"{side}tokens"][row, places][:size], lone[f"{side}tokens"][example][:size])
        if side:
            assert rows["decoder_tokens"][row, places[0]] == tokenizer.pad_id
            places = np.flatnonzero(rows["document_ids"][row] == number)
            assert rows["tokens"][row, places].tolist() == read(lone, example)
            assert rows["positions"][row, places].tolist() == list(range(len(places)))


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=30))
def test_rows_hold_as_many_neighbours_as_fit(pairs):
    sizes = np.array(pairs, np.int64).T
    bounds = pack([sizes[0], sizes[1]], [10, 6])
    assert bounds[0] == 0
    assert bounds[-1] == len(pairs)
    for first, behind in pairwise(bounds):
        assert behind > first
        assert (sizes[:, first:behind].sum(axis=1) <= [10, 6]).all()
        if behind < len(pairs):
            assert (sizes[:, first : behind + 1].sum(axis=1) > [10, 6]).any()


Sequences = st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=3, max_size=3)


@given(Sequences, Sequences, st.lists(st.integers(0, 2), max_size=6))
def test_texts_join_take_and_part_as_lists_do(left, right, indices):
    a, b = Texts.of(left), Texts.of(right)
    whole = [x + y for x, y in zip(left, right, strict=True)]
    assert joined(a, b).lists() == whole
    assert marked(a, b).lists() == [[0] * len(x) + [1] * len(y) for x, y in zip(left, right, strict=True)]
    assert a.take(np.array(indices, np.int64)).lists() == [left[number] for number in indices]
    ends = np.minimum(a.sizes, 3)
    assert a.part(np.minimum(ends, 1), ends).lists() == [x[1:3] for x in left]
    assert a.padded(6, -1).tolist() == [x + [-1] * (6 - len(x)) for x in left]


def test_conversations_are_learned_in_the_turns_of_the_assistant(make_run, tokenizer):
    lines = [{"messages": CHAT}]
    task = built(make_run, tokenizer, "gpt", "generation", lines, columns={"messages": "messages"}, seq_length=100)
    split = task.splits["train"]
    arrays = split.arrays(np.array([0]))
    before = tokenizer.encode("sat on a mat\nUser: a dog?\nAssistant: ")
    first = [*tokenizer.encode("yes"), tokenizer.eos_id]
    between = tokenizer.encode("User: the cat?\nAssistant: ")
    last = [*tokenizer.encode("no maybe"), tokenizer.eos_id]
    whole = before + first + between + last
    assert arrays["tokens"][0, : len(whole)].tolist() == whole
    assert learned(arrays) == [first + last]
    assert split.prompts() == [before + first + between]
    assert split.references == [["no maybe"]]
    short = built(make_run, tokenizer, "gpt", "generation", lines, columns={"messages": "messages"}, seq_length=20)
    arrays = short.splits["train"].arrays(np.array([0]))
    assert [arrays["tokens"][0, 0], *arrays["labels"][0]] == whole[-21:]


def test_roles_have_templates_and_t5_reads_what_comes_before_the_last_answer(make_run, tokenizer):
    keys = {"columns": {"messages": "messages"}, "roles": {"system": "[{content}] ", "assistant": "A: {content}!"}}
    task = built(make_run, tokenizer, "t5", "generation", [{"messages": CHAT[:3]}], **keys)
    arrays = task.splits["train"].arrays(np.array([0]))
    assert read(arrays) == [*tokenizer.encode("[sat on a mat] User: a dog?\nA: "), tokenizer.eos_id]
    assert learned(arrays) == [[*tokenizer.encode("yes!"), tokenizer.eos_id]]
    assert task.metrics("train", ["yes!"])["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("messages", "rule"),
    [
        ([], "is no list of turns, or empty"),
        ([{"role": "user", "content": "x"}], "has no turn of the assistant"),
        ([{"role": "tool", "content": "x"}], "has a turn of role 'tool', which has no template; add it to task.roles"),
        ([{"role": "user", "content": " "}], "has an empty turn of role 'user'"),
        ([{"content": "x"}], "holds a turn that is not"),
    ],
)
def test_broken_conversations_are_refused_by_line(make_run, tokenizer, messages, rule):
    lines = [{"messages": CHAT}, {"messages": messages}]
    with pytest.raises(DataError, match=rf"train.jsonl:2: column 'messages' {rule}"):
        built(make_run, tokenizer, "gpt", "generation", lines, columns={"messages": "messages"})


def test_questions_are_answered_in_text_and_written_answers_are_unwrapped(make_run, tokenizer):
    context = "a cat saw seven trees"
    lines = [
        {"question": "x?", "context": context, "answers": {"text": ["seven", "seven trees"], "answer_start": [10, 10]}},
        {"question": "y?", "context": context, "answers": {"text": [], "answer_start": []}},
    ]
    task = built(make_run, tokenizer, "t5", "extractive_qa", lines, target_template="answer: {answers}")
    split = task.splits["train"]
    assert split.prompts()[0] == tokenizer.encode(f"question: x? context: {context}")
    assert split.references == [["seven", "seven trees"], [""]]
    assert learned(split.arrays(np.array([1]))) == [[*tokenizer.encode("answer: unanswerable"), tokenizer.eos_id]]
    assert task.metrics(split, ["answer: Seven trees.", "answer: unanswerable"])["exact_match"] == 1.0
    assert task.metrics(split, ["seven", "trees"])["exact_match"] == 0.5


def test_numbers_are_written_and_what_is_none_counts_as_the_mean(make_run, tokenizer):
    lines = [{"text": "cat", "target": value} for value in (1, 2.5, 4)]
    task = built(make_run, tokenizer, "gpt", "regression", lines)
    split = task.splits["train"]
    assert learned(split.arrays(np.array([1]))) == [[*tokenizer.encode(" 2.5"), tokenizer.eos_id]]
    assert task.metrics(split, ["1", "no", "4"]) == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    with pytest.raises(ValueError, match="there are 2 texts for 3 examples"):
        task.metrics(split, ["1", "2"])


def test_truth_values_and_numbers_are_labels_as_files_spell_them(make_run, tokenizer):
    lines = [{"text": "cat", "label": True}, {"text": "dog", "label": False}]
    keys = {"labels": [True, False], "label_words": {True: "yes", False: "no"}}
    task = built(make_run, tokenizer, "t5", "classification", lines, **keys)
    assert task.labels == ("true", "false")
    assert learned(task.splits["train"].arrays(np.array([0]))) == [[*tokenizer.encode("yes"), tokenizer.eos_id]]
