"""What is refused of a task's files before a rank starts: one line, with file and line number."""

from __future__ import annotations

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from lmscale.config.check import check_run
from lmscale.config.run import ZeroChoice
from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.errors import DataError, LmscaleError
from lmscale.launcher.validate import validate_run
from lmscale.tasks.build import build_task
from lmscale.tasks.check import check_task
from lmscale.tasks.files import read_examples
from tests.tasks.conftest import MakeRun, write

GOOD = [{"text": "the cat", "label": "x"}, {"text": "a dog", "label": "y"}]


@pytest.mark.parametrize(
    ("kind", "line", "rule"),
    [
        (
            "classification",
            {"txt": "a", "label": "x"},
            "has no column 'text'; it has label, txt; name the column in task.col",
        ),
        ("classification", {"text": "a", "lable": "x"}, "has no column 'label'; it has lable, text"),
        ("classification", {"text": " ", "label": "x"}, "column 'text' is empty"),
        ("classification", {"text": "a", "label": ""}, "column 'label' is empty or no label"),
        ("classification", {"text": ["a"], "label": "x"}, "column 'text' is no text"),
        ("regression", {"text": "a", "target": "much"}, "column 'target' is no number: 'much'"),
        ("regression", {"text": "a", "target": "nan"}, "column 'target' is no number: 'nan'"),
        ("token_classification", {"tokens": ["a", "b"], "tags": ["x"]}, "has 2 tokens and 1 tags"),
        (
            "token_classification",
            {"tokens": ["a", ""], "tags": ["x", "x"]},
            "column 'tokens' is empty, or holds an empty",
        ),
        ("token_classification", {"tokens": 3, "tags": ["x"]}, "column 'tokens' is no list"),
        ("extractive_qa", {"question": "a", "context": "b", "answers": "b"}, "column 'answers' is not {text"),
        (
            "extractive_qa",
            {"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [0]}},
            "column 'answers' says that 'c' begins at 0, where there is 'b'",
        ),
        (
            "extractive_qa",
            {"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [-1]}},
            "column 'answers' says that 'c' begins at -1, where there is ''",
        ),
    ],
)
def test_broken_examples_are_refused_by_line_and_column(make_run: MakeRun, kind, line, rule):
    good = {
        "classification": GOOD[0],
        "regression": {"text": "a", "target": 1},
        "token_classification": {"tokens": ["a", "b"], "tags": ["x", "y"]},
        "extractive_qa": {"question": "a", "context": "b", "answers": {"text": ["b"], "answer_start": [0]}},
    }[kind]
    others = [{"text": "b", "label": "y"}] if kind == "classification" else []
    config = make_run("bert", kind, [good, *others, line] if kind == "classification" else [good, line])
    with pytest.raises(DataError) as caught:
        check_task(config)
    number = 3 if kind == "classification" else 2
    assert f"train.jsonl:{number}: {rule}" in str(caught.value)
    assert caught.value.exit_status == 2


def test_missing_empty_and_unknown_files_are_refused_by_key(make_run: MakeRun, tmp_path: Path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    other = tmp_path / "file.parquet"
    other.write_text("x")
    for path, rule in (
        ("nowhere.jsonl", "there is no such file"),
        (empty, "holds no example"),
        (other, "is of no known kind"),
    ):
        config = make_run("bert", "classification", GOOD, test=[{"name": "t", "path": str(path)}])
        with pytest.raises(DataError, match=rf"task.test.0.path = '.*': {rule}"):
            check_task(config)


def test_a_run_with_a_task_is_checked_with_it_before_any_rank_starts(make_run: MakeRun):
    assert validate_run(make_run("bert", "classification", GOOD, GOOD), 1).num_ranks == 1
    with pytest.raises(LmscaleError, match="has no column 'text'") as caught:
        validate_run(make_run("bert", "classification", [{"x": 1, "label": 1}, {"x": 1, "label": 2}]), 1)
    assert caught.value.exit_status == 2
    small = make_run("bert", "classification", GOOD)
    small = small.model_copy(update={"model": small.model.model_copy(update={"vocab_size": 400})})
    with pytest.raises(DataError, match=r"model.vocab_size = 400: the tokenizer"):
        validate_run(small, 1)


def test_tables_and_lines_of_any_packing_hold_the_same_examples(tmp_path: Path):
    lines = '{"text": "a, \\"b\\"\\nc", "label": "x"}\n\n{"text": "d", "label": "y"}\n'
    comma = 'text,label\n"a, ""b""\nc",x\nd,y\n'
    tab = 'text\tlabel\n"a, ""b""\nc"\tx\nd\ty\n'
    for name, content in (("l.jsonl", lines), ("c.csv", comma), ("t.tsv", tab)):
        plain, packed, frames = tmp_path / name, tmp_path / f"{name}.gz", tmp_path / f"{name}.zst"
        plain.write_text(content)
        packed.write_bytes(gzip.compress(content.encode()))
        frames.write_bytes(zstandard.ZstdCompressor().compress(content.encode()))
        for path in (plain, packed, frames):
            examples = read_examples(str(path), "task.train")
            assert [each.columns for each in examples] == [
                {"text": 'a, "b"\nc', "label": "x"},
                {"text": "d", "label": "y"},
            ]
            assert [each.place.rpartition(":")[2] for each in examples] == (
                ["1", "3"] if "l.jsonl" in name else ["2", "4"]
            )
        assert len(read_examples(str(plain), "task.train", limit=1)) == 1


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("x.jsonl", "{}\n{", "x.jsonl:2: is not JSON"),
        ("x.jsonl", "[1]\n", "x.jsonl:1: is not an object of columns"),
        ("x.csv", "a,b\n1,2\n1\n", "x.csv:3: has 1 cells, and the first line names 2 columns"),
        ("x.csv", "a,a\n1,2\n", "x.csv:1: names column 'a' twice"),
        ("x.csv", 'a,b\n"1,2\n', "x.csv:2: is broken"),
    ],
)
def test_broken_files_are_refused_by_line(tmp_path: Path, name, content, rule):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=rule):
        read_examples(str(tmp_path / name), "task.train")


def test_words_and_answers_may_be_json_in_a_table(make_run: MakeRun, tmp_path: Path, tokenizer: SentencePieceTokenizer):
    path = tmp_path / "words.csv"
    path.write_text('tokens,tags\nthe cat,O B-X\n"[""a"", ""dog""]","[""O"", ""O""]"\n')
    config = make_run("bert", "token_classification", [{}])
    config = config.model_copy(update={"task": config.task.model_copy(update={"train": str(path)})})
    check_task(config)


def test_limits_read_the_first_examples_only(make_run: MakeRun, tmp_path: Path):
    broken = [*GOOD, {"text": "", "label": "x"}]
    test = [{"name": "t", "path": write(tmp_path / "t.jsonl", broken)}]
    limits = {"train_limit": 2, "dev_limit": 2, "test_limit": 2}
    check_task(make_run("bert", "classification", broken, broken, test=test, **limits))
    with pytest.raises(DataError, match=r"t.jsonl:3: column 'text' is empty"):
        check_task(make_run("bert", "classification", broken, broken, test=test, train_limit=2, dev_limit=2))


@pytest.mark.parametrize(("metric", "labels"), [("f1", "xyz"), ("span_f1", "xy")])
def test_metrics_of_other_classes_are_refused(make_run: MakeRun, metric, labels):
    if metric == "f1":
        config = make_run("bert", "classification", [{"text": "a", "label": x} for x in labels], GOOD, metric=metric)
    else:
        lines = [{"tokens": list(labels), "tags": list(labels)}]
        config = make_run("bert", "token_classification", lines, lines, metric=metric)
    with pytest.raises(LmscaleError, match=f"task.metric = '{metric}': is of"):
        check_task(config)


def test_one_class_is_none(make_run: MakeRun):
    with pytest.raises(DataError, match=r"task.train: all examples have the label 'x'; give two classes"):
        check_task(make_run("bert", "classification", GOOD[:1]))


def test_lengths_of_a_task_are_those_of_its_rows(make_run: MakeRun):
    config = make_run("t5", "generation", [{"text": "a", "target": "b"}], decoder_seq_length=9)
    check_run(config, ZeroChoice(stage=1), 1)
    assert (config.lengths.encoder, config.lengths.decoder, config.lengths.nominal) == (48, 9, 57)


def test_a_task_is_checked_without_torch():
    code = "import sys, lmscale.tasks.check; print(sorted({'torch', 'deepspeed', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_task_is_built_once_and_again_when_a_file_changes(make_run: MakeRun, tokenizer: SentencePieceTokenizer):
    config = make_run("bert", "classification", [{"text": "a b", "label": 0}, {"text": "b", "label": 1}])
    first = build_task(config, tokenizer)
    assert build_task(config, tokenizer) is first
    assert build_task(config, tokenizer, room=3) is not first
    with Path(config.task.train).open("a") as file:
        file.write('{"text": "b a", "label": 1}\n')
    assert build_task(config, tokenizer).splits["train"].num_examples == 3
