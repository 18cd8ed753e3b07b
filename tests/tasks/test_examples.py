"""The synthetic tasks: sound files, the same for a seed, noise in training only, nothing given away by words alone."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from lmscale.config.check import check_run
from lmscale.config.io import parse_run
from lmscale.config.run import ZeroChoice
from lmscale.data.tokenizer_training import train_tokenizer
from lmscale.tasks.check import check_task

PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "make_tasks.py"
CHANCE, TOPIC_CHANCE = 1 / 3, 1 / 4
WORDS_ALONE = 0.1
"""Above chance: what a classifier over single words may reach on 300 pairs: three standard deviations of chance are 0.08."""


def load():
    spec = importlib.util.spec_from_file_location("make_tasks", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_tasks"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    load().make(home, 0, 0.0, 900, 300)
    return home


def lines_of(path: Path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_seed_writes_the_same_files_and_noise_changes_training_only(tmp_path):
    make = load().make
    for name, seed, noise in (("a", 1, 0.0), ("b", 1, 0.0), ("noisy", 1, 0.2), ("other", 2, 0.0)):
        make(tmp_path / name, seed, noise, 50, 10)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.jsonl"))
    assert len(files) == 18
    for file in files:
        content = {name: (tmp_path / name / file).read_bytes() for name in ("a", "b", "noisy", "other")}
        assert content["a"] == content["b"] != content["other"]
        assert (content["a"] == content["noisy"]) == (file.name != "train.jsonl")
        if file.name == "train.jsonl":
            pairs = zip(content["a"].splitlines(), content["noisy"].splitlines(), strict=True)
            assert sum(clean != noisy for clean, noisy in pairs) == 10


def test_the_kinds_and_architectures_read_them(tasks, tmp_path):
    train_tokenizer([str(tasks / "text.jsonl")], 700, "bpe", tmp_path)
    nli = {"kind": "classification", "columns": {"text": "premise", "pair": "hypothesis"}}
    for folder, keys, architectures in (
        ("nli", nli, ("bert", "roberta", "gpt", "t5", "bart")),
        ("qa", {"kind": "extractive_qa"}, ("bert", "t5")),
        ("topic", {"kind": "classification"}, ("roberta", "gpt")),
        ("table", {"kind": "generation"}, ("gpt", "bart")),
    ):
        for architecture in architectures:
            check_task(run_of(architecture, tasks / folder, keys, str(tmp_path)))


def run_of(architecture, folder, task, tokenizer):
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": 700}
    tests = [
        {"name": "test", "path": str(folder / "test.jsonl")},
        {"name": "ood", "path": str(folder / "ood.jsonl"), "domain": "out"},
    ]
    files = {"train": str(folder / "train.jsonl"), "dev": str(folder / "dev.jsonl"), "test": tests}
    return parse_run(
        {
            "model": {"architecture": architecture, **sizes},
            "tokenizer": {"path": tokenizer},
            "data": {"seq_length": 160, "decoder_seq_length": 48}
            if architecture in ("t5", "bart")
            else {"seq_length": 160},
            "task": {**task, **files},
            "batch": {"micro_batch_size": 2, "global_batch_size": 4},
            "optim": {"lr": 1.0e-3},
            "train": {"train_tokens": 10**6},
            "output_dir": "run",
        }
    )


def test_labels_are_even_and_words_alone_do_not_give_them_away(tasks):
    from sklearn.linear_model import LogisticRegression

    train, test = lines_of(tasks / "nli" / "train.jsonl"), lines_of(tasks / "nli" / "test.jsonl")
    counts = Counter(line["label"] for line in train)
    assert max(counts.values()) / len(train) < CHANCE + 0.05
    for columns in (("hypothesis",), ("premise", "hypothesis")):
        names = sorted({f"{column} {word}" for line in train for column in columns for word in line[column].split()})
        numbers = {name: number for number, name in enumerate(names)}

        def features(lines, columns=columns, numbers=numbers):
            rows = np.zeros((len(lines), len(numbers)))
            for row, line in zip(rows, lines, strict=True):
                for name in {
                    f"{column} {word}" for column in columns for word in line[column].split()
                } & numbers.keys():
                    row[numbers[name]] = 1.0
            return rows

        model = LogisticRegression(max_iter=2000).fit(features(train), [line["label"] for line in train])
        assert model.score(features(test), [line["label"] for line in test]) < CHANCE + WORDS_ALONE


def test_words_out_of_domain_have_a_topic_by_the_text_alone(tasks):
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    splits = {split: lines_of(tasks / "topic" / f"{split}.jsonl") for split in ("train", "test", "ood")}
    texts = {split: [line["text"] for line in lines] for split, lines in splits.items()}
    labels = {split: [line["label"] for line in lines] for split, lines in splits.items()}
    counts = Counter(labels["train"])
    assert max(counts.values()) / len(labels["train"]) < TOPIC_CHANCE + 0.05
    model = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=2000)).fit(texts["train"], labels["train"])
    assert model.score(texts["test"], labels["test"]) > 0.9
    assert model.score(texts["ood"], labels["ood"]) < TOPIC_CHANCE + WORDS_ALONE


def test_a_sentence_has_the_topic_of_two_of_its_things_and_passages_keep_to_one(tasks):
    module = load()
    whole = {topic: {*module.IN.topics[topic], *module.OUT.topics[topic]} for topic in module.TOPICS}
    for split, domain in (("train", module.IN), ("ood", module.OUT)):
        for line in lines_of(tasks / "topic" / f"{split}.jsonl"):
            words = set(re.findall(r"\w+", line["text"]))
            found = {topic: len(words & set(domain.topics[topic])) for topic in module.TOPICS}
            assert sorted(found.values()) == [0, 0, 1, 2]
            assert found[line["label"]] == 2
    mixed = 0
    for line in lines_of(tasks / "text-topic.jsonl")[:200]:
        words = set(re.findall(r"\w+", line["text"]))
        (topic,) = [topic for topic in module.TOPICS if words & whole[topic]]
        mixed += bool(words & set(module.IN.topics[topic])) and bool(words & set(module.OUT.topics[topic]))
    assert mixed > 150  # things of both domains stand side by side


def test_pairs_have_the_label_that_their_words_say(tasks):
    module = load()
    for split, domain in (("test", module.IN), ("ood", module.OUT)):
        for line in lines_of(tasks / "nli" / f"{split}.jsonl"):
            words = {key: line[key].replace(".", "").split() for key in ("premise", "hypothesis")}
            name = next(word for word in words["hypothesis"] if word in domain.names)
            colour = next(word for word in words["hypothesis"] if word in domain.colours)
            people = [word for word in words["premise"] if word in domain.names]
            colours = [word for word in words["premise"] if word in domain.colours]
            if name not in people:
                assert line["label"] == "neutral"
            else:
                is_right = colours[people.index(name)] == colour
                assert line["label"] == ("entailment" if is_right else "contradiction")


def test_answers_compete_with_others_of_their_kind_and_domains_share_no_words(tasks):
    module = load()
    for line in lines_of(tasks / "qa" / "test.jsonl"):
        answer, (start,) = line["answers"]["text"][0], line["answers"]["answer_start"]
        assert line["context"][start : start + len(answer)] == answer
        kinds = (module.IN.jobs, module.IN.towns, tuple(map(str, module.IN.years)))
        kind = next(words for words in kinds if answer in words)
        assert sum(word in line["context"] for word in kind) >= 2
    for words in (
        "names",
        "colours",
        "things",
        "jobs",
        "towns",
        "years",
        "facts",
        "claims",
        "sentences",
        "places",
        "kinds",
        "talks",
    ):
        assert not set(getattr(module.IN, words)) & set(getattr(module.OUT, words))
    things = [each for domain in (module.IN, module.OUT) for topic in domain.topics.values() for each in topic]
    assert len(set(things)) == len(things)


def test_sentences_say_all_of_a_table_and_no_more(tasks):
    module = load()
    for split, domain in (("train", module.IN), ("ood", module.OUT)):
        words = {"name": domain.places, "kind": domain.kinds, "area": domain.areas, "rating": domain.ratings}
        for line in lines_of(tasks / "table" / f"{split}.jsonl"):
            table = dict(cell.split(": ") for cell in line["text"].split(" | "))
            for sentence in line["target"]:
                assert all(value in sentence for value in table.values())
                assert "{" not in sentence
                for key in words.keys() - table.keys():
                    assert {"rating": "ratings", "area": " in the "}[key] not in sentence


def test_text_says_again_what_it_has_said_as_often_as_asked(tmp_path):
    module = load()
    for told in (1, 3):
        module.make(tmp_path / str(told), 0, 0.0, 60, 5, told)
    for told in (1, 3):
        texts = [line["text"] for line in lines_of(tmp_path / str(told) / "text.jsonl")]
        for number, text in enumerate(texts):
            domain = next(
                each
                for each in (module.IN, module.OUT)
                if set(re.findall(r"\w+", texts[number // 3 * 3])) & set(each.names)
            )
            if number % 3 == 0:  # two facts, then claims that they bear out
                facts, claims = text.split(". ")[:2], text.rstrip(".").split(". ")[2:]
                assert len(claims) == told
                for claim in claims:
                    said = next(fact for fact in facts if set(domain.names) & set(claim.split()) & set(fact.split()))
                    for words in (domain.colours, domain.things):
                        assert set(words) & set(claim.split()) == set(words) & set(said.split())
            elif number % 3 == 1:
                assert text.count("?") == told
    one, three = (lines_of(tmp_path / told / "nli" / "train.jsonl") for told in "13")
    assert one == three


def test_the_program_runs_and_the_page_shows_a_sound_section(tmp_path, monkeypatch):
    page = (PROGRAM.parents[1] / "docs" / "tasks.md").read_text()
    assert "python examples/make_tasks.py --output tasks --noise 0.1" in page
    command = [sys.executable, str(PROGRAM), "--output", "tasks", "--noise", "0.1", "--train", "40", "--held-out", "9"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert len(list(tmp_path.rglob("*.jsonl"))) == 18
    assert subprocess.run([*command, "--noise", "2"], cwd=tmp_path, check=False, capture_output=True).returncode == 2
    train_tokenizer([str(tmp_path / "tasks" / "text.jsonl")], 500, "bpe", tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    config = run_of("t5", tmp_path, {"kind": "classification"}, "tokenizer")
    keys = {**config.model_dump(exclude={"task", "data"}), **shown}
    config = parse_run(keys)
    check_run(config, ZeroChoice(stage=1), 1)
    check_task(config)
