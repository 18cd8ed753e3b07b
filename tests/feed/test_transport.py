from __future__ import annotations

import numpy as np
import torch

from lmscale.feed.transport import pack, unpack


def test_what_is_packed_is_delivered_in_micro_batches() -> None:
    rng = np.random.default_rng(0)
    window = rng.integers(0, 1 << 31, (6, 9))
    arrays = {
        "tokens": window[:, :-1],
        "loss_mask": rng.random((6, 8)).astype(np.float32),
        "wide": rng.integers(-1, 5, (6, 2, 3)),
    }
    batches = list(unpack(pack(arrays), 2, pin=False))
    assert len(batches) == 3
    for name, array in arrays.items():
        assert np.array_equal(torch.cat([batch[name] for batch in batches]).numpy(), array)
        assert all(batch[name].is_contiguous() for batch in batches)
        assert batches[0][name].dtype == (torch.float32 if name == "loss_mask" else torch.int64)
