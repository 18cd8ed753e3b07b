"""Faults are injected into runs on ranks: what is withheld moves nothing, and the run is the one that never saw the step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lmscale.config.checkpoint_paths import find_checkpoint
from lmscale.errors import EXIT_BUDGET, EXIT_INTERRUPTED_AND_SAVED, FaultError
from lmscale.launcher.status import run_rank
from lmscale.train.checkpoint_reader import CheckpointReader
from lmscale.train.faults import FaultAction, Observed
from lmscale.train.progress import Progress
from tests.distributed.ranks import RankFailure, run_ranks
from tests.distributed.runs import Keys, pretrain_in_rank, pretrain_on_ranks, records, run_keys

pytestmark = pytest.mark.distributed

DROPOUT = {"model__hidden_dropout": 0.1, "model__attention_dropout": 0.1}
RAMP = {"batch__ramp": {"start": 4, "increment": 4, "ramp_samples": 12}, "train__train_tokens": 40 * 32}
FP16 = {"precision": "fp16", "loss_scale": {"initial": 1024, "window": 2}}
OFFLOAD = {"deepspeed__zero_optimization__offload_optimizer": {"device": "cpu"}}
WAIT_S = 10.0
"""For a shell that an alert starts; the machine may be busy."""


def zero(stage: int, **more: Any) -> Keys:
    return {"deepspeed__zero_optimization__stage": stage, **more}


LAYOUTS: list[tuple[int, Keys, str]] = [
    (2, zero(0), "gradient"),
    (2, zero(1, precision="bf16", parallel__pp_size=2), "gradient"),
    (2, zero(3), "gradient"),
    (2, zero(1, parallel__tp_size=2), "gradient"),
    (2, zero(2, **FP16), "batch"),
]
"""Ranks, layout, where the fault is: of tensor-parallel ranks, in a copy that no norm counts.

In fp16 a gradient that is not finite is an overflow; a loss is a fault.
"""
MORE_LAYOUTS: list[tuple[int, Keys, str]] = [
    (1, zero(0), "batch"),
    (2, zero(0, parallel__pp_size=2), "gradient"),
    (2, zero(0, parallel__tp_size=2), "gradient"),
    (2, zero(1), "gradient"),
    (2, zero(1, parallel__pp_size=2), "batch"),
    (2, zero(1, precision="bf16"), "gradient"),
    (2, zero(1, parallel__pp_size=2, **FP16), "batch"),
    (2, zero(2), "gradient"),
    (2, zero(1, precision="bf16", parallel__tp_size=2), "gradient"),
    (2, zero(2, precision="bf16", parallel__tp_size=2), "gradient"),
    (2, zero(3, parallel__tp_size=2), "gradient"),
    (2, zero(1, parallel__tp_size=2, **OFFLOAD), "gradient"),
    (2, zero(3, precision="bf16"), "gradient"),
    (2, zero(3, **FP16), "batch"),
    (4, zero(1, parallel__tp_size=2, parallel__pp_size=2), "gradient"),
    (2, zero(1, **OFFLOAD), "gradient"),
    (2, zero(2, **OFFLOAD), "gradient"),
    (2, zero(3, **OFFLOAD), "gradient"),
    (2, zero(2, optim__name="adafactor"), "gradient"),
    (2, zero(1, optim__name="muon"), "gradient"),
]
EVERY_LAYOUT = [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.slow) for layout in MORE_LAYOUTS)]


def train_with_faults(ranks: int, keys: Keys, steps: list[int], where: str = "batch") -> list[Keys]:
    assert run_ranks(ranks, _pretrain_with_faults, keys, steps, where, timeout_s=240.0) == [0] * ranks
    return records(keys)


def _pretrain_with_faults(keys: Keys, steps: list[int], where: str) -> int:
    """Train with a nan on the last rank in some steps, and check on every rank that nothing moves there."""
    from lmscale.train.engine import Engine

    train_step = Engine.train_step

    def poisoned(self: Engine, batches: Any, number: int, step: int, *rest: Any) -> Any:
        if step not in steps:
            return train_step(self, batches, number, step, *rest)
        before, hook = _state(self), None
        if self.topology.rank == self.topology.world_size - 1:
            if where == "batch":
                batches[0]["loss_mask"].view(-1)[3] = math.nan
            else:
                parameter = [p for p in self.model.parameters() if p.requires_grad][-1]
                hook = parameter.register_hook(lambda gradient: gradient * math.nan)
        result = train_step(self, batches, number, step, *rest)
        if hook is not None:
            hook.remove()
        after = _state(self)
        assert before.keys() == after.keys(), before.keys() ^ after.keys()
        moved = [name for name in before if not torch.equal(before[name], after[name])]
        assert not moved, moved
        assert result.is_withheld
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", poisoned)
        return pretrain_in_rank(keys)


def _state(engine: Any) -> dict[str, torch.Tensor]:
    """Copy all that an update moves: weights, master weights, moments, counts and the loss scale."""
    from lmscale.optim.build import update_count
    from lmscale.train.moments import moments

    found: dict[str, torch.Tensor] = {}
    for name, parameter in engine.model.named_parameters():
        found[f"weight {name}"] = getattr(parameter, "ds_tensor", parameter).data
    for fragment in engine.fragments():
        found[f"master {fragment.tensor.name}"] = fragment.master
        for moment in moments(engine.basic_optimizer, fragment):
            found[f"{moment.kind} {moment.tensor.name}"] = moment.values
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    counts = [getattr(scaler, key, 0) for key in ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter")]
    found["counts"] = torch.tensor([update_count(engine.basic_optimizer), *counts], dtype=torch.float64)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def train_without(ranks: int, keys: Keys, steps: list[int]) -> list[Keys]:
    """Train, and take no part of the given steps but their data: the loader reads it, nobody else."""
    assert run_ranks(ranks, _pretrain_without, keys, steps, timeout_s=240.0) == [0] * ranks
    return records(keys)


def _pretrain_without(keys: Keys, steps: list[int]) -> int:
    from lmscale.train.engine import Engine, StepResult

    train_step = Engine.train_step

    def absent(self: Engine, batches: Any, number: int, step: int, *rest: Any) -> Any:
        if step not in steps:
            return train_step(self, batches, number, step, *rest)
        rest[-1](Observed(1.0, 1.0))
        return StepResult(torch.zeros(()), 1.0, self.loss_scale, is_skipped=True, is_withheld=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", absent)
        return pretrain_in_rank(keys)


def same_run(run: list[Keys], reference: list[Keys], but: list[int]) -> bool:
    """Whether the records agree bit for bit; of the steps that were not trained, where the run is and its weights."""
    where = ("step", "consumed_samples", "consumed_tokens", "train/param_norm", "train/lr", "train/global_batch_size")
    trained = ("train/lm_loss", "train/grad_norm", "train/loss_scale", "train/skipped_steps")

    def kept(record: Keys) -> list[Any]:
        return [record.get(key) for key in (where if record["step"] in but else (*where, *trained))]

    return [kept(record) for record in run] == [kept(record) for record in reference]


def newest(keys: Keys) -> CheckpointReader:
    path = find_checkpoint(Path(keys["output_dir"], "checkpoints"))
    assert path is not None
    return CheckpointReader(path)


def progress_of(keys: Keys) -> Progress:
    return newest(keys).progress


def same_state(ours: Keys, theirs: Keys) -> bool:
    """Whether two runs end with the same weights and moments, bit for bit."""
    a, b = newest(ours), newest(theirs)
    assert a._pieces.keys() == b._pieces.keys()
    return all(torch.equal(a.logical(*key), b.logical(*key)) for key in a._pieces)


@pytest.mark.parametrize(("ranks", "changes", "where"), EVERY_LAYOUT, ids=str)
def test_withheld_update_moves_nothing_and_the_run_never_saw_the_step(
    ranks: int, changes: Keys, where: str, corpus: str, tmp_path: Path
) -> None:
    changes = {**changes, **DROPOUT, **RAMP}
    keys = run_keys(corpus, tmp_path / "faults", **changes)
    run = train_with_faults(ranks, keys, [1, 3], where)
    by_hand = run_keys(corpus, tmp_path / "by hand", **changes, train__skip_steps=[1, "3-3"])
    reference = pretrain_on_ranks(ranks, by_hand)
    assert same_run(run, reference, but=[1, 3])
    assert same_state(keys, by_hand)
    assert [record.get("faults/skip") for record in run[:4]] == [1, None, 2, None]
    assert run[2]["faults/non_finite"] is None  # it is not finite, which JSON cannot say
    assert run[-1]["train/skipped_steps"] == 2
    assert progress_of(keys).skipped_steps == 2
    assert progress_of(keys).faults.actions == tuple(FaultAction(step, "non_finite", "skip", None) for step in (1, 3))


@pytest.mark.parametrize(("ranks", "changes", "where"), EVERY_LAYOUT, ids=str)
def test_rewound_run_is_the_one_that_skips_the_steps_by_hand(
    ranks: int, changes: Keys, where: str, corpus: str, tmp_path: Path
) -> None:
    changes = {**changes, **DROPOUT, **RAMP, "checkpoint__save_interval": 2}
    rewind = {"faults__non_finite": {"action": "rewind", "steps_before": 1}}
    keys = run_keys(corpus, tmp_path / "faults", **changes, **rewind)
    run = train_with_faults(ranks, keys, [4], where)
    by_hand = run_keys(corpus, tmp_path / "by hand", **changes, train__skip_steps=["3-4"])
    reference = pretrain_on_ranks(ranks, by_hand)
    assert [record["step"] for record in run] == [1, 2, 3, 4, 5, 6, 7]
    assert same_run(run, reference, but=[3, 4])
    assert same_state(keys, by_hand)
    assert [record.get("faults/rewind") for record in run] == [None, None, 1, None, None, None, None]
    assert progress_of(keys).faults.actions == (FaultAction(4, "non_finite", "rewind", None),)
    assert progress_of(keys).faults.skips == ((3, 4),)


@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (2, zero(1, parallel__pp_size=2)),
        pytest.param(2, zero(0), marks=pytest.mark.slow),
        pytest.param(2, zero(3, precision="bf16"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_skipped_by_hand_consume_their_data_and_nothing_else(
    ranks: int, changes: Keys, corpus: str, tmp_path: Path
) -> None:
    changes = {**changes, **DROPOUT, **RAMP}
    keys = run_keys(corpus, tmp_path / "skips", **changes, train__skip_steps=["2-3", 6])
    run = pretrain_on_ranks(ranks, keys)
    other = run_keys(corpus, tmp_path / "absent", **changes)
    reference = train_without(ranks, other, [2, 3, 6])
    assert same_run(run, reference, but=[2, 3, 6])
    assert same_state(keys, other)
    assert ["train/lm_loss" in record for record in run] == [True, False, False, True, True, False, True]


def test_resumed_run_skips_what_a_rewind_has_left_to_skip(corpus: str, tmp_path: Path) -> None:
    changes = {"checkpoint__save_interval": 2, "faults__non_finite": {"action": "rewind", "steps_before": 2}}
    whole, keys = (run_keys(corpus, tmp_path / name, **changes) for name in ("whole", "parts"))
    reference = train_with_faults(1, whole, [4])
    assert run_ranks(1, _pretrain_with_faults_until, keys, [4], 3) == [EXIT_INTERRUPTED_AND_SAVED]
    assert (progress_of(keys).step, progress_of(keys).faults.skips) == (3, ((3, 4),))
    assert same_run(pretrain_on_ranks(1, keys), reference, but=[3, 4])
    assert same_state(keys, whole)


def _pretrain_with_faults_until(keys: Keys, steps: list[int], until: int) -> int:
    """Train with faults, and ask for a stop where a step is passed over."""
    from lmscale.train import loop
    from lmscale.train.resilience import STOP_FILE

    pass_over = loop._pass_over

    def pass_over_and_ask(run: Any) -> Any:
        if run.progress.step + 1 == until:
            Path(keys["output_dir"], STOP_FILE).touch()
        return pass_over(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_pass_over", pass_over_and_ask)
        return _pretrain_with_faults(keys, steps, "batch")


def test_resumed_run_judges_as_the_uninterrupted_one(corpus: str, tmp_path: Path) -> None:
    changes = {"faults__loss_spike": {"action": "skip", "window": 4, "min_steps": 4, "threshold": 1.0e9}}
    whole, keys = (run_keys(corpus, tmp_path / name, **changes) for name in ("whole", "parts"))
    pretrain_on_ranks(1, whole)
    keys["train"]["stop_at_step"] = 3
    pretrain_on_ranks(1, keys)
    assert len(progress_of(keys).faults.losses) == 3
    del keys["train"]["stop_at_step"]
    pretrain_on_ranks(1, keys)
    assert len(progress_of(keys).faults.losses) == 4
    assert progress_of(keys).faults == progress_of(whole).faults


def test_spent_budget_ends_the_run_with_its_status_and_leaves_the_checkpoint(corpus: str, tmp_path: Path) -> None:
    alert = f"echo $LMSCALE_EVENT $LMSCALE_STEP >> {tmp_path}/alerts"
    changes = {"faults__non_finite__budget": 1, "checkpoint__save_interval": 2, "monitor__alert_command": alert}
    keys = run_keys(corpus, tmp_path, **changes, monitor__tensorboard=True)
    with pytest.raises(RankFailure, match=r"FaultError: faults.non_finite.budget = 1: is spent: step 4") as caught:
        train_with_faults(2, keys, [3, 4])
    assert str(caught.value).count("FaultError: faults.non_finite.budget") == 2
    checkpoints = tmp_path / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step-00000002"]
    run = records(keys)
    assert [(r.get("faults/skip"), r.get("faults/stop")) for r in run] == [(None, None)] * 2 + [(1, None), (None, 1)]
    assert all(math.isfinite(record["train/param_norm"]) for record in run)
    assert _lines(tmp_path / "alerts", 2) == {"fault 3", "failure 4"}
    assert _tags(tmp_path / "tensorboard") >= {"faults/skip", "faults/stop", "faults/non_finite"}


def _lines(path: Path, number: int) -> set[str]:
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end and (not path.is_file() or len(path.read_text().splitlines()) < number):
        time.sleep(0.05)
    return set(path.read_text().splitlines())


def _tags(directory: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_rank_that_the_policy_ends_has_a_status_of_its_own() -> None:
    def end() -> int:
        raise FaultError("is spent", field="faults.non_finite.budget", value=1)

    assert run_rank(end) == EXIT_BUDGET == 77


def test_stop_ends_the_run_at_the_first_fault(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, faults__non_finite__action="stop", checkpoint__save_interval=1)
    message = r"FaultError: faults.non_finite.action = 'stop': step 3: the loss is not finite"
    with pytest.raises(RankFailure, match=message):
        train_with_faults(1, keys, [3])
    assert find_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000002"


def test_rewind_without_a_checkpoint_says_so(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, faults__non_finite__action="rewind", checkpoint__save_interval=5)
    message = r"step 2: the loss is not finite, and there is no checkpoint of an earlier step to go back to"
    with pytest.raises(RankFailure, match=message):
        train_with_faults(1, keys, [2])


def test_spike_is_skipped_on_every_rank_together(corpus: str, tmp_path: Path) -> None:
    spike = {"action": "skip", "window": 4, "min_steps": 4}
    keys = run_keys(
        corpus, tmp_path, **zero(1, parallel__pp_size=2), faults__grad_norm_spike=spike, train__train_tokens=8 * 32 * 7
    )
    assert run_ranks(2, _pretrain_with_a_spike, keys, 5) == [0, 0]
    run = records(keys)
    assert ["faults/skip" in record for record in run] == [False, False, False, False, True, False, False]
    assert run[4]["faults/grad_norm_spike"] > 16.0
    assert run[4]["train/grad_norm"] > 100 * run[3]["train/grad_norm"]
    assert run[4]["train/param_norm"] == run[3]["train/param_norm"] != run[5]["train/param_norm"]


def _pretrain_with_a_spike(keys: Keys, at: int) -> int:
    """Train with the gradient of one parameter a million times as large, on one rank in one step."""
    from lmscale.train.engine import Engine

    train_step = Engine.train_step

    def spiked(self: Engine, batches: Any, number: int, step: int, *rest: Any) -> Any:
        if step != at or self.topology.rank:
            return train_step(self, batches, number, step, *rest)
        parameter = [p for p in self.model.parameters() if p.requires_grad][-1]
        hook = parameter.register_hook(lambda gradient: gradient * 1.0e6)
        try:
            return train_step(self, batches, number, step, *rest)
        finally:
            hook.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_step", spiked)
        return pretrain_in_rank(keys)


def test_overflow_storm_ends_the_run_and_fewer_overflows_do_not(corpus: str, tmp_path: Path) -> None:
    changes = {"precision": "fp16", "loss_scale": {"initial": 2**40, "hysteresis": 1}}
    keys = run_keys(corpus, tmp_path, **zero(2, **changes), faults__overflow_storm={"overflows": 3})
    message = r"faults.overflow_storm.action = 'stop': step 3: 3 of the last 3 steps overflowed"
    with pytest.raises(RankFailure, match=message):
        pretrain_on_ranks(2, keys)
    assert [record["train/loss_scale"] for record in records(keys)] == [2.0**40, 2.0**39, 2.0**38]


def test_run_without_faults_has_no_word_of_them(corpus: str, tmp_path: Path) -> None:
    keys = run_keys(corpus, tmp_path, train__stop_at_step=2)
    run = pretrain_on_ranks(1, keys)
    assert not [tag for record in run for tag in record if tag.startswith("faults/")]
    manifest = json.loads((newest(keys).path / "manifest.json").read_text())
    empty = {"actions": [], "noted": 0, "skips": [], "losses": [], "grad_norms": [], "overflows": []}
    assert manifest["progress"]["faults"] == empty
