"""BART and T5 write and score as transformers' models with the same weights would."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmscale.evaluate.encoder_decoder import EncoderDecoderModel
from lmscale.evaluate.sampling import Sampling
from tests.distributed.ranks import run_ranks
from tests.evaluate.reference import VOCAB_SIZE, largest_error, some_tokens
from tests.evaluate.stacks import BOS, EOS, PAD, SENTINELS, SEP, SEQ2SEQ, load_pair

pytestmark = pytest.mark.distributed

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
GREEDY = Sampling(temperature=0.0)
NUM_NEW = 40
"""More than the 16 distances that have a bucket of T5's relative bias each."""
SOURCES = [(some_tokens(length, seed=length).clamp(min=SEP + 1)).tolist() for length in (11, 3, 1, 24)]


def _read(family: str, source: list[int]) -> torch.Tensor:
    return torch.tensor([[*([BOS] if family == "bart" else []), *source, EOS]])


def _start(family: str) -> list[int]:
    return [EOS, BOS] if family == "bart" else [PAD]


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_logits_equal_those_of_transformers(tmp_path, family):
    assert max(run_ranks(1, _logits_errors, str(tmp_path), family)[0]) <= TOLERANCE


def _logits_errors(directory: str, family: str) -> list[float]:
    ours, reference = load_pair(directory, family)
    assert isinstance(ours, EncoderDecoderModel)
    tokens, decoder = some_tokens(2, 40).clamp(min=SEP + 1), some_tokens(2, 30, seed=8)
    tokens[1, 25:] = PAD
    ids = -(tokens == PAD).long()
    with torch.no_grad():
        padded = reference(tokens, attention_mask=1 + ids, decoder_input_ids=decoder, use_cache=False).logits
        alone = reference(tokens[:1], decoder_input_ids=decoder[:1], use_cache=False).logits
    return [
        largest_error(ours.logits(tokens, decoder, ids), padded),
        largest_error(ours.logits(tokens[:1], decoder[:1]), alone),
    ]


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_greedy_text_with_the_caches_equals_text_without_them_and_that_of_transformers(tmp_path, family):
    found = run_ranks(1, _greedy_ways, str(tmp_path), family)[0]
    assert all(len(ids) == NUM_NEW for ids in found["cached"])
    assert len({token for ids in found["cached"] for token in ids}) > 10
    assert found["cached"] == found["recomputed"]
    assert found["cached"] == found["transformers"]
    assert found["batch"] == found["cached"], "padding shows"
    assert found["projections"] == {"linear_kv": 1, "linear_q": NUM_NEW}, "the memory is projected more than once"


def _greedy_ways(directory: str, family: str) -> dict[str, Any]:
    ours, reference = load_pair(directory, family)
    found: dict[str, Any] = {
        "cached": [ours.generate_ids([source], NUM_NEW, GREEDY)[0] for source in SOURCES],
        "recomputed": [_without_caches(ours, family, source) for source in SOURCES],
        "transformers": [_by_reference(reference, family, source) for source in SOURCES],
    }
    counts = {"linear_kv": 0, "linear_q": 0}
    for name, layer in ours.module.named_modules():
        kind = name.rpartition(".")[2]
        if kind in counts and f"{_last_layer(ours)}.cross_attention" in name:
            layer.register_forward_hook(lambda *_, kind=kind: counts.update({kind: counts[kind] + 1}))
    return {**found, "batch": ours.generate_ids(SOURCES, NUM_NEW, GREEDY), "projections": counts}


def _last_layer(model: EncoderDecoderModel) -> str:
    return max((name for name, _ in model.module.named_children() if name.isdigit()), key=_has_cross(model))


def _has_cross(model: EncoderDecoderModel) -> Any:
    layers = dict(model.module.named_children())
    return lambda name: (hasattr(layers[name], "cross_attention"), int(name))


def _without_caches(model: EncoderDecoderModel, family: str, source: list[int]) -> list[int]:
    ids, start = list(_start(family)), len(_start(family))
    for _ in range(NUM_NEW):
        ids.append(int(model.logits(_read(family, source), torch.tensor([ids]))[0, -1].argmax()))
    return ids[start:]


def _by_reference(reference: Any, family: str, source: list[int]) -> list[int]:
    inputs, start = _read(family, source), len(_start(family))
    reference.generation_config.eos_token_id = None
    reference.generation_config.forced_bos_token_id = BOS if family == "bart" else None
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NUM_NEW + start - 1}
    out = reference.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    ids: list[int] = out[0, start:].tolist()
    return ids


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_scores_equal_those_of_transformers(tmp_path, family):
    errors, lengths = run_ranks(1, _score_errors, str(tmp_path), family)[0]
    assert lengths == [(7, 7), (1, 1), (0, 0), (12, 12)]
    assert max(errors) <= TOLERANCE


def _score_errors(directory: str, family: str) -> tuple[list[float], list[tuple[int, int]]]:
    ours, reference = load_pair(directory, family)
    targets = [some_tokens(length, seed=50 + length).tolist() for length in (7, 1, 0, 12)]
    scores = ours.score(SOURCES, targets, batch_size=3)
    errors = []
    for source, target, score in zip(SOURCES, targets, scores, strict=True):
        if not target:
            continue
        decoder = torch.tensor([[*_start(family), *target[:-1]]])
        with torch.no_grad():
            logits = reference(_read(family, source), decoder_input_ids=decoder, use_cache=False).logits
        log_p = logits[0, -len(target) :].log_softmax(-1)
        truth = log_p.gather(1, torch.tensor(target)[:, None]).squeeze(1)
        errors.append(largest_error(torch.tensor(score.log_likelihoods), truth))
        assert score.are_likeliest == (log_p.argmax(-1) == torch.tensor(target)).tolist()
    return errors, [(len(score.token_ids), len(score.log_likelihoods)) for score in scores]


def test_texts_are_completed_and_stop_at_the_end(tmp_path):
    found = run_ranks(1, _texts, str(tmp_path))[0]
    assert found["t5 plain"] == found["t5 expected"]
    assert found["t5 filled"] == f"20 {found['t5 span']} 30".replace("  ", " ")
    assert found["bart"] == found["bart expected"]
    assert found["seed 1"] == found["seed 1 again"] != found["seed 2"]
    whole, part, stop = found["whole"], found["stopped"], found["stop"]
    assert part == whole[: whole.index(stop)]
    assert all(0 <= token < VOCAB_SIZE for ids in found["hot"] for token in ids)
    assert len(found["ended"]) == 3


def _texts(directory: str) -> dict[str, Any]:
    t5, _ = load_pair(directory, "t5")
    bart, _ = load_pair(directory, "bart")
    decode = t5.tokenizer.decode
    (whole,) = t5.generate_ids([[20, 30]], 12, GREEDY)
    stop = whole[-1]
    written = [SENTINELS[0], 77, 78, SENTINELS[1], 79]
    (plain,) = t5.generate_ids([[20, 30]], 12, GREEDY, EOS)
    (infilled,) = bart.generate_ids([[20, 4, 30]], 12, GREEDY, EOS)
    found = {
        "whole": whole,
        "stopped": t5.generate_ids([[20, 30]], 12, GREEDY, stop)[0],
        "stop": stop,
        "ended": t5.generate_ids([[20, 30]], 12, GREEDY, None, lambda ids: len(ids) == 3)[0],
        "t5 plain": t5.generate("20 30", 12, temperature=0.0),
        "t5 expected": [decode(plain)],
        "bart": bart.generate("20 <mask> 30", 12, temperature=0.0),
        "bart expected": [decode(infilled)],
        "seed 1": bart.generate(["20 <mask>", "30"], 12, seed=1),
        "seed 1 again": bart.generate(["20 <mask>", "30"], 12, seed=1),
        "seed 2": bart.generate(["20 <mask>", "30"], 12, seed=2),
        "hot": bart.generate_ids(SOURCES, 20, Sampling(temperature=100.0, seed=1)),
    }
    t5.generate_ids = lambda *_: [written]
    return {**found, "t5 filled": t5.generate("20 <extra_id_0> 30")[0], "t5 span": "77 78"}


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_two_ranks_write_as_one(tmp_path, family):
    (one,) = run_ranks(1, _on_ranks, str(tmp_path), family)
    for rank in run_ranks(2, _on_ranks, str(tmp_path), family):
        assert rank["greedy"] == one["greedy"]
        assert largest_error(rank["scores"], one["scores"]) <= TOLERANCE


def _on_ranks(directory: str, family: str) -> dict[str, Any]:
    import torch.distributed as dist

    ours, _ = load_pair(f"{directory}/{dist.get_world_size()}-{dist.get_rank()}", family)
    scores = ours.score(SOURCES, SOURCES[::-1])
    return {
        "greedy": ours.generate_ids(SOURCES, 20, GREEDY),
        "scores": torch.tensor([score.total for score in scores]),
    }
