from __future__ import annotations

import os
import signal
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lmscale.config.run import RunConfig
from lmscale.data.windows import Windows
from lmscale.errors import DataError
from lmscale.feed.loader import Batch, build_blend, build_train_loader, build_valid_loaders
from lmscale.optim.batch_ramp import sizes_of
from lmscale.optim.steps import Steps, step_plan
from tests.data.corpora import keys_of, random_documents, write_corpus
from tests.feed.runs import make_run

# A machine with fewer CPUs than workers is slow, which these tests may be.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def eight(run: RunConfig, consumed: int = 0) -> list[tuple[int, int, int]]:
    return [(first, 8, 16) for first in range(consumed, -(-run.train.train_tokens // 16), 8)]


def rows(batches: list[Batch], name: str = "tokens") -> list[list[float]]:
    return torch.cat([batch[name] for batch in batches]).tolist()


def test_a_run_reads_the_samples_of_its_blend_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    batches = list(build_train_loader(run, 0, 1, eight(run)))
    blend = build_blend(run)
    windows = blend.read(blend.locate(np.arange(40))).tokens
    assert rows(batches) == windows[:, :-1].tolist()
    assert rows(batches, "labels") == windows[:, 1:].tolist()
    assert all(batch["tokens"].shape == (2, 16) and batch["tokens"].dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("isolate", [False, True])
def test_workers_change_nothing(tmp_path: Path, num_workers: int, isolate: bool) -> None:
    # Enough for several messages from each worker.
    more = ("train.train_tokens=8000", f"data.reset_attention_mask={isolate}")
    run = make_run(tmp_path, overrides=more)
    alone = list(build_train_loader(run, 0, 1, eight(run)))
    run = make_run(tmp_path, overrides=(*more, f"data.num_workers={num_workers}"))
    helped = list(build_train_loader(run, 0, 1, eight(run)))
    assert len(alone) == len(helped) == 252
    assert set(alone[0]) == set(helped[0])
    assert len(alone[0]) == (5 if isolate else 3)
    for one, other in zip(alone, helped, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_ranks_share_the_samples_of_one_rank(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    alone = list(build_train_loader(run, 0, 1, eight(run)))
    ranks = [list(build_train_loader(run, rank, 2, eight(run))) for rank in range(2)]
    assert rows(alone) == rows([batch for pair in zip(*ranks, strict=True) for batch in pair])


def test_a_resumed_run_reads_on(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    whole = list(build_train_loader(run, 0, 1, eight(run)))
    assert rows(whole[8:]) == rows(list(build_train_loader(run, 0, 1, eight(run, 16))))


def test_train_valid_and_test_share_no_window(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_corpora=1, overrides=("train.eval_batches=1000",))
    trained = build_blend(run).sources[0]
    (held_out,) = build_valid_loaders(run, 0, 1).values()
    seen = {tuple(row) for row in trained.read(keys_of(np.arange(trained.num_samples()))).tokens[:, :-1].tolist()}
    held = {tuple(row) for row in rows(list(held_out.read()))}
    assert len(held) > 10
    assert not seen & held


def test_held_out_corpora_are_read_in_order_and_again_from_the_start(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "held", random_documents(15))
    valid = [{"name": "books", "prefix": str(tmp_path / "held")}]
    run = make_run(tmp_path, overrides=("train.eval_batches=100",), valid=valid)
    loaders = [build_valid_loaders(run, rank, 2) for rank in range(2)]
    assert list(loaders[0]) == ["books"]
    windows = Windows(corpus, None, 16)
    assert windows.num_samples() % 4, "the test wants a last batch that is not full"
    for _ in range(2):
        ranks = [list(loader["books"].read()) for loader in loaders]
        dealt = [batch for pair in zip(*ranks, strict=True) for batch in pair]
        assert (
            rows(dealt)[: windows.num_samples()]
            == windows.read(keys_of(np.arange(windows.num_samples()))).tokens[:, :-1].tolist()
        )
        assert sum(map(sum, rows(dealt, "loss_mask"))) == 16 * windows.num_samples()


def test_an_evaluation_reads_eval_batches_at_most(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    loaders = build_valid_loaders(run, 0, 1)
    assert list(loaders) == ["c0", "c1"]
    assert loaders["c0"].num_micro_batches == len(list(loaders["c0"].read())) == 2 * 8 / 2
    assert sum(map(sum, rows(list(loaders["c0"].read()), "loss_mask"))) == 2 * 8 * 16
    assert build_valid_loaders(make_run(tmp_path, split="1,0,0"), 0, 1) == {}


def test_corpora_of_one_name_are_numbered(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_corpora=1)
    other = tmp_path / "other" / "c0"
    write_corpus(other, random_documents(200))
    data = run.data.model_copy(
        update={"train": [*run.data.train, run.data.train[0].model_copy(update={"prefix": str(other)})]}
    )
    assert list(build_valid_loaders(run.model_copy(update={"data": data}), 0, 1)) == ["c0-0", "c0-1"]


def test_a_wrong_vocabulary_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("model.vocab_size=999",))
    with pytest.raises(DataError, match="vocabulary of 1000"):
        build_train_loader(run, 0, 1, eight(run))
    with pytest.raises(DataError, match="vocabulary of 1000"):
        build_valid_loaders(run, 0, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_worker_s_error_reaches_the_user_in_one_line(tmp_path: Path, num_workers: int) -> None:
    run = make_run(tmp_path, overrides=("model.vocab_size=500", f"data.num_workers={num_workers}"))
    for manifest in tmp_path.glob("*.json"):
        manifest.unlink()
    with pytest.raises(DataError, match=r"outside model\.vocab_size = 500") as caught:
        list(build_train_loader(run, 0, 1, eight(run)))
    assert "\n" not in str(caught.value)
    assert caught.value.rule


def test_workers_outlive_the_signals_that_ask_a_run_to_stop(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("data.num_workers=1", "train.train_tokens=64000"))
    others = set(_children(os.getpid()))  # ranks of other tests, which their pool keeps for the next one
    loader = build_train_loader(run, 0, 1, eight(run))
    next(loader)
    (worker,) = set(_children(os.getpid())) - others
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        os.kill(worker, number)
    assert len(list(loader)) == 2000 - 1


def test_loader_that_is_closed_ends_its_workers(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=("data.num_workers=1", "train.train_tokens=64000"))
    others = set(_children(os.getpid()))
    loader = build_train_loader(run, 0, 1, eight(run))
    assert isinstance(loader, Generator)
    next(loader)
    assert set(_children(os.getpid())) - others
    loader.close()
    assert set(_children(os.getpid())) == others


def _children(parent: int) -> list[int]:
    """List the data loader's workers: forked by this process, they run its command."""
    command = Path(f"/proc/{parent}/cmdline").read_bytes()
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in listed if Path(f"/proc/{child}/cmdline").read_bytes() == command]


CURRICULUM = (
    "data.seq_length_stages=[{seq_length: 4, until_tokens: 150}, {seq_length: 9, until_tokens: 700}]",
    "batch.stages=[{batch_size: 4, until_tokens: 300}]",
    "train.train_tokens=2000",
)


def steps_of(run: RunConfig, samples: int = 0, tokens: int = 0) -> Steps:
    return Steps(sizes_of(run), samples, tokens, run.train.train_tokens)


def test_steps_that_are_left_out_keep_their_samples_and_lengths(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=CURRICULUM)
    whole = list(steps_of(run))
    left = replace(steps_of(run), skipped=((2, 3), (6, 6), (1000, 2000)))
    assert list(left) == [step for number, step in enumerate(whole, 1) if number not in (2, 3, 6)]
    samples, tokens = whole[4].first_sample, sum(step.batch_size * step.seq_length for step in whole[:4])
    resumed = Steps(sizes_of(run), samples, tokens, run.train.train_tokens, done=4, skipped=((6, 7),))
    assert list(resumed) == [whole[4], *whole[7:]]
    batches = iter(build_train_loader(run, 0, 1, left))
    expected = iter(build_train_loader(run, 0, 1, [whole[0], *whole[3:5], *whole[6:]]))
    assert [batch["tokens"].tolist() for batch in batches] == [batch["tokens"].tolist() for batch in expected]


@pytest.mark.parametrize("more", [(), ("data.reset_attention_mask=true",), ("data.num_workers=2",)], ids=str)
def test_curriculum_reads_the_first_tokens_of_each_window_in_order(tmp_path: Path, more: tuple[str, ...]) -> None:
    run = make_run(tmp_path, overrides=(*CURRICULUM, *more))
    batches, sample = list(build_train_loader(run, 0, 1, steps_of(run))), 0
    blend = build_blend(run)
    assert {batch["tokens"].shape[1] for batch in batches} == {4, 9, 16}
    for batch in batches:
        length = batch["tokens"].shape[1]
        samples = blend.read(blend.locate(np.arange(sample, sample + 2)))
        assert batch["tokens"].tolist() == samples.tokens[:, :length].tolist()
        assert batch["labels"].tolist() == samples.tokens[:, 1 : length + 1].tolist()
        if samples.document_ids is not None:
            assert batch["document_ids"].tolist() == samples.document_ids[:, :length].tolist()
        sample += 2


def test_curriculum_resumed_inside_a_stage_reads_on_for_every_number_of_ranks(tmp_path: Path) -> None:
    run = make_run(tmp_path, overrides=CURRICULUM)
    whole, plan = list(build_train_loader(run, 0, 1, steps_of(run))), step_plan(sizes_of(run))
    for done in (3, 12, 14, 20):
        left = steps_of(run, plan.samples_after(done), plan.tokens_after(done))
        ranks = [list(build_train_loader(run, rank, 2, left)) for rank in range(2)]
        dealt = [batch["tokens"].tolist() for pair in zip(*ranks, strict=True) for batch in pair]
        assert dealt == [batch["tokens"].tolist() for batch in whole[plan.samples_after(done) // 2 :]]


def test_a_run_resumed_with_another_batch_reads_each_sample_once(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    doubled = make_run(tmp_path, overrides=("batch.global_batch_size=16",))
    before, after = list(steps_of(run))[:3], steps_of(doubled, 24, 24 * 16)
    batches = [*build_train_loader(run, 0, 1, before), *build_train_loader(doubled, 0, 1, after)]
    blend = build_blend(run)
    windows = blend.read(blend.locate(np.arange(24 + 16))).tokens
    assert [step.batch_size for step in after] == [16]
    assert rows(batches) == windows[:, :-1].tolist()
