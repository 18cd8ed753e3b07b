from __future__ import annotations

import pickle

import numpy as np
import torch

from lmscale.errors import DataError
from lmscale.feed.transport import SlotFiller, Slots
from lmscale.objectives.base import Arrays

RNG = np.random.default_rng(0)


def make_arrays(num_rows: int = 6) -> Arrays:
    window = RNG.integers(0, 1 << 40, (num_rows, 10))
    return {
        "loss_mask": RNG.random((num_rows, 9)).astype(np.float32),
        "tokens": window[:, :-1],
        "deep": RNG.integers(-1, 5, (num_rows, 2, 3)),
    }


def test_what_is_filled_in_is_taken_out_in_micro_batches() -> None:
    arrays, other = make_arrays(), make_arrays(4)
    slots = Slots(2, arrays, shared=True)
    filled = [slots.fill(0, arrays), slots.fill(1, other)]
    for expected, slot in zip((arrays, other), filled, strict=True):
        batches = list(slots.take(slot, 2, pin=False))
        assert len(batches) == len(expected["tokens"]) / 2
        for name, array in expected.items():
            assert np.array_equal(torch.cat([batch[name] for batch in batches]).numpy(), array)
            assert batches[0][name].numpy().dtype == array.dtype


def test_what_was_taken_out_does_not_change_when_the_slot_is_filled_again() -> None:
    arrays = make_arrays()
    slots = Slots(1, arrays, shared=False)
    (batch,) = slots.take(slots.fill(0, arrays), 6, pin=False)
    slots.fill(0, make_arrays())
    assert np.array_equal(batch["tokens"].numpy(), arrays["tokens"])


def test_an_error_travels_with_all_its_parts() -> None:
    def fail(indices: np.ndarray, seq_length: int | None) -> Arrays:
        raise DataError("is wrong", field="here", value=3, remedy="mend it")

    returned = SlotFiller(fail, Slots(1, make_arrays(), shared=False)).__getitems__((0, [1, 2], None))
    error = pickle.loads(pickle.dumps(returned))
    assert isinstance(error, DataError)
    assert (str(error), error.field, error.value) == ("here = 3: is wrong; mend it", "here", 3)
