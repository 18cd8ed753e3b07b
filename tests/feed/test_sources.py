"""From tokenized text to the samples of each objective, and through the loader."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmscale.config.lengths import SampleLengths
from lmscale.config.run import RunConfig
from lmscale.data.blocks import Blocks, SentenceBlocks
from lmscale.data.indexed import IndexedCorpus
from lmscale.data.pairs import SentencePairs
from lmscale.data.samples import Samples
from lmscale.data.tokenizer import SentencePieceTokenizer
from lmscale.errors import DataError
from lmscale.feed.loader import Batch, build_blend, build_train_loader, build_valid_loaders
from lmscale.feed.sources import open_held_out, open_train
from lmscale.objectives.base import Arrays, Vocabulary
from tests.data.corpora import keys_of, write_corpus
from tests.feed.runs import make_encoder_run

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")

OBJECTIVES: dict[str, dict[str, Any]] = {
    "bert": {"name": "bert"},
    "bert, static": {"name": "bert", "static_copies": 2},
    "roberta": {"name": "roberta"},
    "roberta, documents": {"name": "roberta", "packing": "doc_sentences"},
    "bart": {"name": "bart"},
    "bart, blocks": {"name": "bart", "packing": "blocks"},
    "t5": {"name": "t5"},
}
KINDS = {"bert": SentencePairs, "roberta": SentenceBlocks, "bart": SentenceBlocks, "t5": Blocks, "bart, blocks": Blocks}


class Shown:
    """Stands in for each objective: shows the samples as they came."""

    def make_batch(self, samples: Samples) -> Arrays:
        arrays: Arrays = {"tokens": samples.tokens, "keys": samples.keys, "lengths": samples.lengths}
        arrays["loss_mask"] = np.ones(samples.tokens.shape, np.float32)
        if samples.is_random_next is not None:
            arrays["is_random_next"] = samples.is_random_next.astype(np.int64)
        return arrays


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(objective: Any, lengths: SampleLengths, vocabulary: Vocabulary) -> Shown:
        return Shown()

    monkeypatch.setattr("lmscale.feed.loader.build_objective", build)
    # Several messages from each worker, in short runs.
    monkeypatch.setattr("lmscale.feed.loader._TOKENS_A_MESSAGE", 1 << 11)


@pytest.fixture
def make(tmp_path: Path, prefix: Path, tokenizer_path: Path) -> Any:
    def make_run(name: str, *overrides: str) -> RunConfig:
        return make_encoder_run(tmp_path, prefix, tokenizer_path, OBJECTIVES[name], overrides)

    return make_run


def read(config: RunConfig, rank: int = 0, size: int = 1, consumed: int = 0) -> list[Batch]:
    nominal = config.lengths.nominal
    steps = [(first, 8, nominal) for first in range(consumed, -(-config.train.train_tokens // nominal), 8)]
    return list(build_train_loader(config, rank, size, steps))


def are_equal(ones: list[Batch], others: list[Batch]) -> bool:
    return len(ones) == len(others) and all(
        torch.equal(one[name], other[name]) for one, other in zip(ones, others, strict=True) for name in one
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_samples_do_not_depend_on_workers_ranks_or_interruptions(make: Any, name: str) -> None:
    config = make(name)
    whole = read(config)
    samples = -(-config.train.train_tokens // config.lengths.nominal)
    assert len(whole) == -(-samples // 8) * 4
    assert whole[0]["tokens"].shape == (2, config.lengths.raw)
    assert torch.cat([batch["keys"][:, 2] for batch in whole]).max() >= 1, "the test wants several epochs"
    assert are_equal(whole, read(make(name, "data.num_workers=2")))
    dealt = zip(read(config, 0, 2), read(config, 1, 2), strict=True)
    assert are_equal(whole, [batch for pair in dealt for batch in pair])
    assert are_equal(whole[12:], read(config, consumed=24))


@pytest.mark.parametrize("name", KINDS)
def test_each_objective_has_its_source_in_training_and_held_out(make: Any, name: str) -> None:
    config = make(name)
    train, (held_out,) = open_train(config), open_held_out(config).values()
    assert type(train[0]) is type(held_out) is KINDS[name]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_held_out_samples_are_read_in_order_and_filling_rows_do_not_count(make: Any, name: str) -> None:
    config = make(name, "train.eval_batches=1000")
    (source,) = open_held_out(config).values()
    (held_out,) = build_valid_loaders(config, 0, 1).values()
    batches = list(held_out.read())
    tokens = torch.cat([batch["tokens"] for batch in batches])
    count = source.num_samples()
    assert np.array_equal(tokens[:count], source.read(keys_of(np.arange(count), seed=config.train.seed)).tokens)
    masks = torch.cat([batch["loss_mask"] for batch in batches])
    assert masks[:count].min() == 1
    assert not masks[count:].any()
    if name.startswith("bert"):
        labels = torch.cat([batch["is_random_next"] for batch in batches])
        assert labels[:count].min() >= 0
        assert (labels[count:] == -1).all()


@pytest.mark.parametrize("name", ["roberta", "roberta, documents", "bart, blocks", "t5"])
def test_an_epoch_has_each_token_of_the_text_once(make: Any, name: str, prefix: Path) -> None:
    config = make(name, "data.split='100,0,0'")
    blend = build_blend(config)
    size = blend.sources[0].num_samples()
    corpus = IndexedCorpus(prefix)
    expected = np.bincount(corpus.tokens, minlength=420)
    for epoch in range(2):
        samples = blend.read(blend.locate(np.arange(epoch * size, (epoch + 1) * size)))
        counted = np.bincount(samples.tokens[np.arange(config.lengths.raw) < samples.lengths[:, None]], minlength=420)
        difference = expected - counted
        assert difference[3] >= 0
        difference[3] = 0
        assert difference.sum() <= 1  # a last piece of one token


@pytest.mark.parametrize(("name", "has_ends"), [("bert", False), ("t5", False), ("roberta", True), ("bart", True)])
def test_document_ends_are_read_as_separators_only(make: Any, name: str, has_ends: bool) -> None:
    samples = build_blend(make(name)).sources[0].read(keys_of(np.arange(10)))
    is_end = samples.tokens == 3
    assert is_end.any() == has_ends
    assert not is_end[np.arange(10), samples.lengths - 1].any()


def test_a_pair_is_text_of_two_places(make: Any, tokenizer_path: Path, text: Path) -> None:
    source = build_blend(make("bert")).sources[0]
    samples = source.read(keys_of(np.arange(30)))
    tokenizer = SentencePieceTokenizer(tokenizer_path)
    content = text.read_text()
    for row in range(30):
        assert samples.first_lengths is not None
        first, length = samples.first_lengths[row], samples.lengths[row]
        for segment in (samples.tokens[row, :first], samples.tokens[row, first:length]):
            # A truncated segment may begin or end inside a character.
            assert tokenizer.decode(segment.tolist()).strip("\ufffd\n").split("\n")[0] in content


def test_documents_without_sentences_are_refused(make: Any, tmp_path: Path) -> None:
    write_corpus(tmp_path / "flat", [[300, 301, 3]] * 50, 420)
    (tmp_path / "flat.json").unlink()
    for name, what in (("bert", "objective bert"), ("roberta", "objective.packing: full_sentences")):
        config = make(name, f"data.train=[{{prefix: {tmp_path}/flat}}]")
        with pytest.raises(DataError, match=rf"{what} is made of; .*--sentences split"):
            read(config)


def test_sources_are_opened_without_torch() -> None:
    program = "import sys, lmscale.feed.sources, lmscale.feed.vocabulary; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
