"""Generation with the key/value cache: what it writes is what a model without a cache, or transformers, would write."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmscale.evaluate.inference import LanguageModel
from lmscale.evaluate.sampling import Sampling
from tests.distributed.ranks import run_ranks
from tests.evaluate.reference import FAMILIES, MAX_POSITIONS, VOCAB_SIZE, load_pair, some_tokens

pytestmark = pytest.mark.distributed

GREEDY = Sampling(temperature=0.0)
NUM_NEW = 24
PROMPTS = [some_tokens(length, seed=length).tolist() for length in (11, 3, 1, 20)]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_with_the_cache_equals_text_without_it_and_that_of_transformers(tmp_path, family):
    found = run_ranks(1, _greedy_three_ways, str(tmp_path), family)[0]
    assert all(len(ids) == NUM_NEW for ids in found["cached"])
    assert len({token for ids in found["cached"] for token in ids}) > 10
    assert found["cached"] == found["recomputed"]
    assert found["cached"] == found["transformers"]
    assert found["batch"] == found["cached"], "left padding shows"


def _greedy_three_ways(directory: str, family: str) -> dict[str, list[list[int]]]:
    ours, reference = load_pair(directory, family)
    return {
        "cached": [ours.generate_ids([prompt], NUM_NEW, GREEDY)[0] for prompt in PROMPTS],
        "recomputed": [_without_cache(ours, prompt) for prompt in PROMPTS],
        "transformers": [_by_reference(reference, prompt) for prompt in PROMPTS],
        "batch": ours.generate_ids(PROMPTS, NUM_NEW, GREEDY),
    }


def _without_cache(model: LanguageModel, prompt: list[int]) -> list[int]:
    ids = list(prompt)
    for _ in range(NUM_NEW):
        ids.append(int(model.logits(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def _by_reference(reference: Any, prompt: list[int]) -> list[int]:
    inputs = torch.tensor([prompt])
    options = {"do_sample": False, "max_new_tokens": NUM_NEW, "pad_token_id": 0}
    out = reference.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    ids: list[int] = out[0, len(prompt) :].tolist()
    return ids


def test_text_fills_all_positions_and_stops_at_the_document_end(tmp_path):
    full, stopped, stop_id = run_ranks(1, _to_the_end, str(tmp_path))[0]
    assert [len(ids) for ids in full] == [MAX_POSITIONS - max(map(len, PROMPTS))] * len(PROMPTS)
    for whole, part in zip(full, stopped, strict=True):
        assert part == (whole[: whole.index(stop_id)] if stop_id in whole else whole)
    assert 0 < len(stopped[0]) < len(full[0])


def _to_the_end(directory: str) -> tuple[list[list[int]], list[list[int]], int]:
    model, _ = load_pair(directory, "gpt2")
    full = model.generate_ids(PROMPTS, None, GREEDY)
    stop_id = next(token for token in full[0] if token != full[0][0])
    return full, model.generate_ids(PROMPTS, None, GREEDY, stop_id), stop_id


def test_samples_repeat_with_their_seed_and_never_hold_a_padded_id(tmp_path):
    found = run_ranks(1, _samples, str(tmp_path))[0]
    assert found["seed 1"] == found["seed 1 again"]
    assert found["seed 1"] != found["seed 2"]
    assert found["no seed"] != found["no seed again"]
    assert found["top_k 1"] == found["greedy"] == found["top_p tiny"]
    assert all(0 <= token < VOCAB_SIZE for ids in found["hot"] for token in ids)
    assert len({token for ids in found["hot"] for token in ids}) > VOCAB_SIZE // 2


def _samples(directory: str) -> dict[str, list[list[int]]]:
    model, _ = load_pair(directory, "gpt2")

    def sample(**options: Any) -> list[list[int]]:
        return model.generate_ids(PROMPTS, NUM_NEW, Sampling(**options))

    return {
        "seed 1": sample(seed=1),
        "seed 1 again": sample(seed=1),
        "seed 2": sample(seed=2),
        "no seed": sample(),
        "no seed again": sample(),
        "greedy": sample(temperature=0.0),
        "top_k 1": sample(top_k=1),
        "top_p tiny": sample(top_p=1e-6),
        "hot": model.generate_ids(PROMPTS * 4, 40, Sampling(temperature=100.0, seed=1)),
    }


def test_a_prefix_language_model_reads_the_prompt_as_its_prefix(tmp_path):
    cached, recomputed, causal = run_ranks(1, _with_prefix, str(tmp_path))[0]
    assert cached == recomputed != causal


def _with_prefix(directory: str) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    model, _ = load_pair(directory, "gpt2", objective={"name": "causal_lm", "prefix_lm": True})
    recomputed = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        while ids.size(1) < len(prompt) + NUM_NEW:
            places = torch.arange(ids.size(1))[None]
            logits = model.module((ids, places, torch.zeros_like(ids), (places < len(prompt)).long()))
            ids = torch.cat((ids, logits[:, -1:, :VOCAB_SIZE].argmax(-1)), dim=1)
        recomputed.append(ids[0, len(prompt) :].tolist())
    plain, _ = load_pair(f"{directory}/plain", "gpt2")
    return (
        model.generate_ids(PROMPTS, NUM_NEW, GREEDY),
        recomputed,
        plain.generate_ids(PROMPTS, NUM_NEW, GREEDY),
    )
