"""Prompts: counts, layouts, what they leave alone, what they begin as, and where they stand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmscale.adapt.prompt import frequent_ids, mean_embeddings, pieces_of_vectors
from lmscale.batch import FIELDS
from lmscale.config.adapt import PromptTuningConfig
from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.config.io import parse_run
from lmscale.config.model import ModelConfig
from lmscale.config.prompt_rules import PROMPT_RULES
from lmscale.evaluate.loading import read_config
from lmscale.feed.counts import count_tokens
from lmscale.feed.loader import build_train_loader
from lmscale.feed.prompt import with_prompt
from lmscale.models.heads import first_token
from lmscale.plan.adaptation import own_shapes
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.adapt.text_bases import LAYOUTS, LENGTH, STEPS, TextBases, compute, trained_names
from tests.distributed.runs import Keys, largest_difference, losses, norms, pretrain_on_ranks, run_keys
from tests.distributed.test_objectives import prepared  # noqa: F401

TOLERANCE = 1.0e-5
"""Relative, losses and gradient norms over the steps in fp32: sums in another order."""
NO_RATE = 1.0e-30
"""Leaves weights as they begin: a rate must be above 0."""
K = 4
ADAPT: Keys = {"method": "prompt_tuning", "length": K}


@pytest.fixture(scope="module")
def bases(prepared: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> TextBases:  # noqa: F811
    return TextBases(prepared, tmp_path_factory.mktemp("bases"))


def test_the_count_is_that_of_the_paper() -> None:
    model = ModelConfig(architecture="t5", num_layers=24, hidden_size=4096, num_attention_heads=64, vocab_size=32128)
    shapes = own_shapes(model, PromptTuningConfig(length=100))
    assert sum(math.prod(shape) for shape in shapes.values()) == 409_600


QUICK = {("gpt", "tp2-pp2"), ("bert", "dp2-zero3-full"), ("bart", "sp"), ("t5", "pp2"), ("gpt", "dp2-zero2")}
CASES = [
    pytest.param(a, l, marks=[] if (a, l) in QUICK else [pytest.mark.slow])
    for a in ("gpt", "bert", "roberta", "bart", "t5")
    for l in LAYOUTS
]


@pytest.mark.distributed
@pytest.mark.parametrize(("architecture", "layout"), CASES)
def test_layouts_train_alike(architecture: str, layout: str, bases: TextBases, tmp_path: Path) -> None:
    reference = bases.reference(architecture, architecture, ADAPT)
    ranks, changes = LAYOUTS[layout]
    run = pretrain_on_ranks(ranks, bases.keys(architecture, ADAPT, tmp_path, **changes))
    assert len(run) == STEPS
    assert largest_difference(losses(run), losses(reference)) < TOLERANCE
    assert largest_difference(norms(run), norms(reference)) < TOLERANCE


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("architecture", "layout"), [("bert", "tp2-pp2"), pytest.param("bart", "dp2-zero3", marks=pytest.mark.slow)]
)
def test_the_prompt_alone_is_trained_and_saved(
    architecture: str, layout: str, bases: TextBases, tmp_path: Path
) -> None:
    ranks, changes = LAYOUTS[layout]
    names = trained_names(ranks, bases.keys(architecture, ADAPT, tmp_path, **changes))
    reader = CheckpointReader(find_checkpoint(tmp_path / "checkpoints"))
    place = "encoder_embedding" if architecture == "bart" else "input_embedding"
    assert names == {f"{place}.prompt.table"}
    assert reader.shapes() == {f"{place}.prompt.table": (K, 32)}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["dp2-zero3", pytest.param("tp2-pp2", marks=pytest.mark.slow)])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(layout: str, bases: TextBases, tmp_path: Path) -> None:
    ranks, changes = LAYOUTS[layout]
    whole = pretrain_on_ranks(ranks, bases.keys("t5", ADAPT, tmp_path / "whole", **changes))
    keys = bases.keys("t5", ADAPT, tmp_path / "parts", **changes)
    keys["train"]["stop_at_step"] = 1
    pretrain_on_ranks(ranks, keys)
    keys["train"]["stop_at_step"] = STEPS
    run = pretrain_on_ranks(ranks, keys)
    assert losses(run) == losses(whole)
    assert norms(run) == norms(whole)


def _begun(bases: TextBases, adapt: Keys, home: Path, layout: str) -> torch.Tensor:
    """Return the prompt that a run on GPT begins with."""
    ranks, changes = LAYOUTS[layout]
    still = {"optim__lr": NO_RATE, **changes, "train__stop_at_step": 1}
    pretrain_on_ranks(ranks, bases.keys("gpt", {**ADAPT, **adapt}, home, **still))
    reader = CheckpointReader(find_checkpoint(home / "checkpoints"))
    return reader.logical(PARAMETER, "input_embedding.prompt.table").clone()


def _words(bases: TextBases) -> torch.Tensor:
    return CheckpointReader(Path(bases.base("gpt"))).logical(PARAMETER, "word_embedding.table.weight").clone()


@pytest.mark.distributed
def test_vocabulary_begins_with_embeddings_of_frequent_tokens_on_every_layout(bases: TextBases, tmp_path: Path) -> None:
    vectors = _begun(bases, {}, tmp_path / "one", "selective")
    same = (vectors[:, None] == _words(bases)[None]).all(dim=-1)
    assert (same.sum(dim=1) == 1).all()
    chosen = same.int().argmax(dim=1)
    assert len(set(chosen.tolist())) == K
    counts = count_tokens(parse_run(bases.keys("gpt", ADAPT, tmp_path)))
    assert (counts[chosen.numpy()] > 0).all()
    assert torch.equal(_begun(bases, {}, tmp_path / "four", "tp2-pp2"), vectors)


@pytest.mark.distributed
def test_text_begins_with_its_embeddings_repeated(bases: TextBases, tmp_path: Path) -> None:
    from lmscale.data.tokenizer import load_tokenizer

    text = {"init": "text", "init_text": "the cat"}
    vectors = _begun(bases, text, tmp_path, "dp2-zero3")
    ids = load_tokenizer(read_config(Path(bases.base("gpt"))).tokenizer).encode("the cat")
    assert torch.equal(vectors, _words(bases)[(ids * K)[:K]])


@pytest.mark.distributed
@pytest.mark.parametrize(("init", "low"), [("uniform_sym", -0.25), ("uniform_pos", 0.0)])
def test_uniform_draws_fill_their_interval(init: str, low: float, bases: TextBases, tmp_path: Path) -> None:
    vectors = _begun(bases, {"init": init, "init_scale": 0.25}, tmp_path, "selective")
    assert vectors.min() >= low
    assert vectors.max() <= 0.25
    assert vectors.min() < low + 0.05 * (0.25 - low)
    assert vectors.max() > 0.25 - 0.05 * (0.25 - low)


def test_frequent_tokens_are_counted_ones_without_the_special() -> None:
    counts = np.array([9, 0, 5, 7, 7, 1])
    assert frequent_ids(counts, [0], 6).tolist() == [3, 4, 2, 5]
    assert frequent_ids(None, [0, 2], 5).tolist() == [1, 3, 4]
    assert len(frequent_ids(None, [], 40_000)) == 5000


def test_labels_are_means_of_their_pieces_and_the_rest_vocabulary() -> None:
    adapt = PromptTuningConfig(length=4, init="labels", entries=2)
    pieces = pieces_of_vectors(adapt, 1, np.array([7, 8, 9]), labels=[[1, 2], [3]])
    assert [entry[:2] for entry in pieces] == [[[1, 2], [3]]] * 2
    assert all({7, 8, 9} >= {token for [token] in entry[2:]} and entry[2] != entry[3] for entry in pieces)
    table = torch.arange(20.0).view(10, 2)
    vectors = mean_embeddings(pieces, table)
    assert vectors.shape == (2, 4, 2)
    assert torch.equal(vectors[0, 0], (table[1] + table[2]) / 2)


def test_tokens_are_drawn_again_only_where_there_are_too_few() -> None:
    candidates = np.arange(5)
    [few] = pieces_of_vectors(PromptTuningConfig(length=5), 0, candidates)
    assert sorted(token for [token] in few) == [0, 1, 2, 3, 4]
    [many] = pieces_of_vectors(PromptTuningConfig(length=9), 0, candidates)
    assert len(many) == 9


@pytest.mark.distributed
def test_rows_of_several_prompts_compute_what_each_alone_does(bases: TextBases) -> None:
    base, draw = bases.base("gpt"), torch.Generator().manual_seed(2)
    table = torch.randn(3, K, 32, generator=draw)
    tokens = torch.randint(10, 400, (2, 9), generator=draw)
    arrays = {name: torch.from_numpy(a) for name, a in with_prompt({"tokens": tokens.numpy()}, K).items()}
    name = "input_embedding.prompt.table"
    rows = {**arrays, "adapter_ids": torch.tensor([2, 0])}
    together, grads = compute(base, {**ADAPT, "entries": 3}, {name: table}, rows, torch.ones(()))
    for row, entry in ((0, 2), (1, 0)):
        own = {key: value[row : row + 1] for key, value in arrays.items()}
        alone, grad = compute(base, ADAPT, {name: table[entry]}, own, torch.ones(()))
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=TOLERANCE * float(alone.abs().max()))
        torch.testing.assert_close(
            grads[name][entry], grad[name], rtol=0, atol=TOLERANCE * float(grad[name].abs().max())
        )
    assert not grads[name][1].any()


def _arrays(**arrays: Any) -> dict[str, np.ndarray]:
    kinds = {field.name: field.dtype for field in FIELDS}
    return {name: np.asarray(array, kinds[name]) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            {"tokens": [[5, 6]], "labels": [[6, 7]], "loss_mask": [[1, 1]], "is_prefix": [[1, 0]]},
            {
                "tokens": [[0, 0, 5, 6]],
                "labels": [[0, 0, 6, 7]],
                "loss_mask": [[0, 0, 1, 1]],
                "is_prefix": [[1, 1, 1, 0]],
                "prompt_places": [[0, 1, -1, -1]],
            },
        ),
        (
            {
                "tokens": [[5, 6]],
                "document_ids": [[0, -1]],
                "token_types": [[1, 0]],
                "masked_positions": [[1, 0]],
                "labels": [[9, 0]],
                "loss_mask": [[1, 0]],
                "is_random_next": [1],
            },
            {
                "tokens": [[0, 0, 5, 6]],
                "document_ids": [[0, 0, 0, -1]],
                "token_types": [[0, 0, 1, 0]],
                "masked_positions": [[3, 2]],
                "labels": [[9, 0]],
                "loss_mask": [[1, 0]],
                "is_random_next": [1],
                "prompt_places": [[0, 1, -1, -1]],
            },
        ),
        (
            {"tokens": [[5, 6]], "decoder_tokens": [[1, 2]], "labels": [[2, 3]], "loss_mask": [[1, 1]]},
            {
                "tokens": [[0, 0, 5, 6]],
                "decoder_tokens": [[1, 2]],
                "labels": [[2, 3]],
                "loss_mask": [[1, 1]],
                "prompt_places": [[0, 1, -1, -1]],
            },
        ),
        (
            {"tokens": [[5, 6]], "positions": [[0, 1]]},
            {"tokens": [[0, 0, 5, 6]], "positions": [[0, 1, 2, 3]], "prompt_places": [[0, 1, -1, -1]]},
        ),
    ],
    ids=["gpt", "bert", "bart", "positions"],
)
def test_places_of_a_prompt_come_in_front(before: dict[str, Any], after: dict[str, Any]) -> None:
    made = with_prompt(_arrays(**before), 2)
    wanted = _arrays(**after)
    assert made.keys() == wanted.keys()
    for name, array in wanted.items():
        assert made[name].dtype == array.dtype
        assert np.array_equal(made[name], array), name


@pytest.mark.parametrize("architecture", ["gpt", "bert", "roberta", "bart", "t5"])
def test_a_row_holds_the_prompt_and_what_a_shorter_sample_holds(
    architecture: str, bases: TextBases, tmp_path: Path
) -> None:
    keys = bases.keys(architecture, ADAPT, tmp_path)
    config, shorter = parse_run(keys), parse_run(keys)
    shorter = shorter.model_copy(
        update={"adapt": None, "data": shorter.data.model_copy(update={"seq_length": LENGTH - K})}
    )
    ours, plain = _first(config), _first(shorter)
    wanted = with_prompt({name: tensor.numpy() for name, tensor in plain.items()}, K)
    assert ours.keys() == wanted.keys()
    assert ours["tokens"].shape[1] == LENGTH
    for name, array in wanted.items():
        assert np.array_equal(ours[name].numpy(), array), name
    assert config.lengths.encoder == LENGTH
    assert config.lengths.decoder == shorter.lengths.decoder


def _first(config: Any) -> dict[str, torch.Tensor]:
    from lmscale.optim.batch_ramp import sizes_of
    from lmscale.optim.steps import Steps

    steps = Steps(sizes_of(config), 0, 0, config.train.train_tokens)
    return next(build_train_loader(config, 0, 1, steps))


def test_a_curriculum_cuts_rows_with_their_prompt(corpus: str, tmp_path: Path) -> None:
    stages = [{"seq_length": 16, "until_tokens": 512}]
    keys = run_keys(corpus, tmp_path, adapt=ADAPT, data__seq_length_stages=stages)
    batch = _first(parse_run(keys))
    assert batch["tokens"].shape[1] == 16
    assert batch["prompt_places"][0].tolist() == [0, 1, 2, 3] + [-1] * 12


def test_the_first_token_stands_behind_the_prompt() -> None:
    hidden = torch.arange(12.0).view(2, 3, 2)
    places = torch.tensor([[0, 1, -1], [-1, -1, -1]])
    assert torch.equal(first_token(hidden, places), torch.stack((hidden[0, 2:], hidden[1, :1])))
    assert torch.equal(first_token(hidden, None), hidden[:, :1])


PREFIX: Keys = {"method": "prefix_tuning", "length": 16}


@pytest.mark.parametrize("adapt", [{**ADAPT, "length": 31}, PREFIX])
def test_what_just_fits_is_taken(adapt: Keys, corpus: str, tmp_path: Path) -> None:
    length = 32 if adapt["method"] == "prompt_tuning" else 16
    config = parse_run(run_keys(corpus, tmp_path, adapt=adapt, data__seq_length=length))
    for rule in PROMPT_RULES:
        rule(config)
