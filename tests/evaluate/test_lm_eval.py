"""Tasks of lm-evaluation-harness on our models, against log-likelihoods that are computed by hand. Nothing is downloaded."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.evaluate import reference, stacks
from tests.evaluate.stacks import EOS, IdTokenizer

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None,
        reason="lm-eval is not installed: half a gigabyte, pip install lmscale[eval]",
    ),
]

TOLERANCE = 1.0e-5
QUESTIONS = [
    {"question": "20 21 22", "choices": ["23 24", "24 25", "26 27 28"], "answer": 1, "text": "30 31 32 33"},
    {"question": "40 39", "choices": ["41 42", "43 44", "44 45 46"], "answer": 0, "text": "50 51" + " 52 53" * 59},
    {"question": "60 61", "choices": ["62 61", "63 62", "64 63"], "answer": 2, "text": "70 71"},
]
TASKS = {
    "ours_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: answer
doc_to_choice: choices
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "ours_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
""",
    "ours_writing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["7"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def _write_tasks(home: Path) -> str:
    directory = home / "tasks"
    directory.mkdir(parents=True)
    (directory / "data.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    common = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {directory}/data.jsonl}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (directory / f"{name}.yaml").write_text(f"task: {name}\n{common}{text}metadata: {{version: 1}}\n")
    return str(directory)


def _offline(directory: str) -> None:
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": f"{directory}/hf"}


def test_tasks_of_a_local_file_give_what_the_scores_say(tmp_path):
    results, expected, outputs = run_ranks(1, _run_gpt, str(tmp_path), _write_tasks(tmp_path))[0]
    assert {(row.task, row.metric): row.value for row in results} == pytest.approx(expected, rel=TOLERANCE)
    assert {row.num_samples for row in results} == {len(QUESTIONS)}
    assert 0 < expected["ours_choice", "acc"] < 1, "the task tells nothing"
    assert any(outputs)
    assert not any("7" in text for text in outputs)


def _run_gpt(directory: str, tasks: str) -> tuple[list[Any], dict[tuple[str, str], float], list[str]]:
    _offline(directory)
    from lm_eval.api.instance import Instance

    from lmscale.evaluate.lm_eval import HarnessModel, run_tasks

    model, _ = reference.load_pair(directory, "gpt2")
    model.tokenizer = IdTokenizer()
    results = run_tasks(model, list(TASKS), tasks_dir=tasks, batch_size=2)
    right = 0.0
    for row in QUESTIONS:
        texts = [f"{row['question']} {choice}" for choice in row["choices"]]
        num_read = len(row["question"].split())
        sums = [sum(score.log_likelihoods[num_read - 1 :]) for score in model.score(texts)]
        right += sums.index(max(sums)) == row["answer"]
    total = sum(_rolling(model, [int(word) for word in row["text"].split()]) for row in QUESTIONS)
    words = sum(len(row["text"].split()) for row in QUESTIONS)
    written = [
        Instance("generate_until", {}, (row["question"], {"until": ["7"], "max_gen_toks": 8}), 0) for row in QUESTIONS
    ]
    outputs = HarnessModel(model, 2).generate_until(written)
    expected = {
        ("ours_choice", "acc"): right / len(QUESTIONS),
        ("ours_rolling", "word_perplexity"): math.exp(-total / words),
        ("ours_writing", "exact_match"): 0.0,
    }
    return results, expected, outputs


def _rolling(model: Any, ids: list[int]) -> float:
    """Sum over windows of 64 predicted tokens; the last one goes back to be full."""
    whole, total = [EOS, *ids], 0.0
    for first in range(0, len(ids), 64):
        last = min(first + 64, len(ids))
        begin = max(0, last - 64)
        logits = model.logits(torch.tensor([whole[begin:last]]))[0].log_softmax(-1)
        total += sum(float(logits[place - begin, whole[place + 1]]) for place in range(first, last))
    return total


def test_contexts_are_cut_from_the_left_and_answers_come_in_order(tmp_path):
    found, expected = run_ranks(1, _requests, str(tmp_path))[0]
    for (value, is_greedy), (truth, truth_is_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(truth, rel=TOLERANCE)
        assert is_greedy == truth_is_greedy
    assert {is_greedy for _, is_greedy in found} == {True, False}


def _requests(directory: str) -> tuple[list[tuple[float, bool]], list[tuple[float, bool]]]:
    _offline(directory)
    from lm_eval.api.instance import Instance

    from lmscale.evaluate.lm_eval import HarnessModel

    model, truth = reference.load_pair(directory, "gpt2")
    model.tokenizer = IdTokenizer()
    texts = [reference.some_tokens(length, seed=length).tolist() for length in (5, 63, 64, 100, 2, 0)]
    best = int(model.logits(torch.tensor([texts[0]]))[0, -1].argmax())
    continuations = [[best], [9, 10], [11], [12, 13, 14], [15], [16, 17]]
    spelled = [
        Instance("loglikelihood", {}, (" ".join(map(str, context)), "".join(f" {token}" for token in new)), 0)
        for context, new in zip(texts, continuations, strict=True)
    ]
    expected = []
    for context, new in zip(texts, continuations, strict=True):
        read = torch.tensor([[*(context or [EOS]), *new][-65:][:-1]])
        with torch.no_grad():
            log_p = truth(read).logits[0, -len(new) :].log_softmax(-1)
        labels = torch.tensor(new)
        value = float(log_p.gather(1, labels[:, None]).sum())
        expected.append((value, bool((log_p.argmax(-1) == labels).all())))
    return HarnessModel(model, 4).loglikelihood(spelled, disable_tqdm=True), expected


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoders_read_the_context_in_the_encoder(tmp_path, family):
    found, expected, texts, written = run_ranks(1, _seq2seq, str(tmp_path), family)[0]
    assert [value for value, _ in found] == pytest.approx(expected, rel=TOLERANCE)
    assert texts == written


def _seq2seq(directory: str, family: str) -> tuple[Any, list[float], list[str], list[str]]:
    _offline(directory)
    from lm_eval.api.instance import Instance

    from lmscale.evaluate.lm_eval import HarnessModel
    from lmscale.evaluate.sampling import Sampling

    model, _ = stacks.load_pair(directory, family)
    harness = HarnessModel(model, 2)
    room = {"bart": 64, "t5": 32}[family] - 2
    contexts, targets = ["20 21", "", "30 " * 90], [" 22 23", " 24", " 25 26 27"]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in zip(contexts, targets, strict=True)]
    sources = [[20, 21], [], [30] * room]
    scores = model.score(sources, [model.tokenizer.encode(target) for target in targets])
    options = {"until": [], "max_gen_toks": 6}
    texts = harness.generate_until([Instance("generate_until", {}, (text, options), 0) for text in contexts])
    ids = model.generate_ids(sources, 6, Sampling(temperature=0.0), EOS)
    found = harness.loglikelihood(requests, disable_tqdm=True)
    return found, [score.total for score in scores], texts, [model.tokenizer.decode(row) for row in ids]


def test_what_cannot_be_asked_is_refused_in_one_line(tmp_path):
    assert run_ranks(1, _refusals, str(tmp_path), _write_tasks(tmp_path))[0] == [
        "model.architecture = 'bert': gives a text no likelihood and writes none, which the tasks ask for; "
        "use a gpt, bart or t5",
        "model.architecture = 't5': gives a text without a context no likelihood, which a task of rolling likelihoods "
        "asks for; use another task",
        "--lm-eval = 'nothing': is not a task of lm-evaluation-harness; name a task, or its directory: --tasks-dir",
        "max_gen_toks = 64: leaves no room for the context: the model reads 64 tokens; "
        "set it in the task's generation_kwargs",
    ]


def _refusals(directory: str, tasks: str) -> list[str]:
    _offline(directory)
    from lm_eval.api.instance import Instance

    from lmscale.errors import ConfigError
    from lmscale.evaluate.lm_eval import HarnessModel, run_tasks

    bert, t5 = (stacks.load_pair(directory, family)[0] for family in ("bert", "t5"))
    gpt, _ = reference.load_pair(directory, "gpt2")
    gpt.tokenizer = IdTokenizer()
    request = Instance("generate_until", {}, ("20", {"until": [], "max_gen_toks": 64}), 0)
    refused = []
    for action in (
        lambda: run_tasks(bert, ["ours_choice"], tasks_dir=tasks),
        lambda: run_tasks(t5, ["ours_rolling"], tasks_dir=tasks),
        lambda: run_tasks(gpt, ["nothing"]),
        lambda: HarnessModel(gpt, 2).generate_until([request]),
    ):
        with pytest.raises(ConfigError) as error:
            action()
        refused.append(str(error.value))
    return refused
