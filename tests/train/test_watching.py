"""What runs on ranks show beside their metrics: the same on every layout, and training goes on as without it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lmscale.data.tokenizer_training import train_tokenizer
from tests.distributed.runs import Keys, losses, pretrain_on_ranks, run_keys

pytestmark = pytest.mark.distributed

WATCHED = {"monitor__tensorboard": True, "monitor__histogram_interval": 3, "train__eval_interval": 3}
LAYOUTS: list[tuple[int, Keys]] = [
    (2, {"parallel__tp_size": 2}),
    (2, {"parallel__pp_size": 2}),
    (2, {"deepspeed__zero_optimization__stage": 1}),
    (2, {"deepspeed__zero_optimization__stage": 3}),
]
NUM_PARAMETERS_TOLERANCE = 1.0e-5
"""Of sums over weights that were trained for three steps on another layout."""


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    home = tmp_path_factory.mktemp("tokenizer")
    text = "the quick brown fox jumps over a lazy dog while seven wise owls watch from an old oak tree at night"
    words = text.split()
    lines = [json.dumps({"text": " ".join(words[n % 19 :] + words[: n % 7]) + f" {n * 7919}"}) for n in range(4000)]
    (home / "text.jsonl").write_text("\n".join(lines))
    train_tokenizer([str(home / "text.jsonl")], 500, "bpe", home)
    return str(home)


def samples(tokenizer_path: str, temperature: float) -> Keys:
    given = {"prompts": ["the quick", "seven wise owls"], "max_new_tokens": 5, "temperature": temperature}
    return {"tokenizer__path": tokenizer_path, "monitor__samples": given}


def watch(corpus: str, directory: Path, ranks: int, **changes: Any) -> tuple[list[Keys], EventAccumulator]:
    keys = run_keys(corpus, directory, **{**WATCHED, **changes})
    run = pretrain_on_ranks(ranks, keys)
    accumulator = EventAccumulator(str(directory / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0})
    accumulator.Reload()
    return run, accumulator


def texts(accumulator: EventAccumulator, number: int) -> list[tuple[int, bytes]]:
    found = accumulator.Tensors(f"samples/{number}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0]) for event in found]


def test_histograms_and_samples_are_those_of_one_rank_on_every_layout(
    corpus: str, tmp_path: Path, tokenizer_path: str
) -> None:
    changes = samples(tokenizer_path, temperature=0.0)
    _, one = watch(corpus, tmp_path / "one", 1, **changes)
    tags = one.Tags()["histograms"]
    weights = [tag for tag in tags if tag.startswith("weights/")]
    assert [event.step for event in one.Histograms(weights[0])] == [3, 6]
    assert len([tag for tag in tags if tag.startswith("first_moment/")]) == len(weights)
    assert [step for step, _ in texts(one, 1)] == [3, 6]
    assert b"    seven wise owls" in texts(one, 1)[0][1]
    for number, (ranks, layout) in enumerate(LAYOUTS):
        _, other = watch(corpus, tmp_path / str(number), ranks, **changes, **layout)
        assert sorted(other.Tags()["histograms"]) == sorted(tags)
        for tag in tags:
            ours, theirs = (each.Histograms(tag)[0].histogram_value for each in (one, other))
            assert theirs.num == ours.num, (tag, layout)
            assert theirs.min == pytest.approx(ours.min, rel=1e-3, abs=1e-6)
            assert theirs.sum_squares == pytest.approx(ours.sum_squares, rel=1e-3, abs=NUM_PARAMETERS_TOLERANCE)
            assert sum(theirs.bucket) == theirs.num
        assert [texts(other, prompt) for prompt in (0, 1)] == [texts(one, prompt) for prompt in (0, 1)]


def test_training_goes_on_as_if_nobody_watched(corpus: str, tmp_path: Path, tokenizer_path: str) -> None:
    dropout = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
    drawn = samples(tokenizer_path, temperature=1.0)
    watched, accumulator = watch(corpus, tmp_path / "watched", 2, **drawn, **dropout)
    quiet = pretrain_on_ranks(2, run_keys(corpus, tmp_path / "quiet", train__eval_interval=3, **dropout))
    assert losses(watched) == losses(quiet)
    _, again = watch(corpus, tmp_path / "again", 2, **drawn, **dropout)
    assert texts(again, 0) == texts(accumulator, 0)
    assert texts(accumulator, 0)[0][1] != texts(accumulator, 0)[1][1]  # another step, another draw
    assert "manifest/text_summary" in accumulator.Tags()["tensors"]


def test_a_start_whose_writers_cannot_be_opened_is_no_start_of_the_run(corpus: str, tmp_path: Path) -> None:
    from tests.distributed.ranks import RankFailure

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        keys = run_keys(corpus, tmp_path / "run", monitor__prometheus_port=taken.getsockname()[1])
        with pytest.raises(RankFailure, match=r"monitor\.prometheus_port"):
            pretrain_on_ranks(1, keys)
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_prompt_without_room_is_refused_on_every_rank(corpus: str, tmp_path: Path, tokenizer_path: str) -> None:
    from tests.distributed.ranks import RankFailure

    changes = samples(tokenizer_path, temperature=0.0)
    changes["monitor__samples"]["prompts"] = ["the quick brown fox " * 8]
    with pytest.raises(RankFailure, match=r"monitor\.samples\.prompts"):
        watch(corpus, tmp_path / "run", 2, **changes)
