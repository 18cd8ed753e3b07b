"""What happened to a run, read from its records and its manifest."""

from __future__ import annotations

from pathlib import Path

from lmscale.report.marks import Mark, events_of, known_milestones_of, milestones_of
from lmscale.report.run_files import read_run
from tests.report.runs import TOKENS_PER_STEP, plain_records, record, write_run


def test_starts_carry_the_reason_that_the_supervisor_noted(tmp_path: Path) -> None:
    manifest = {
        "started_at": "C",
        "resume_step": 20,
        "restarts": [{"time": "-", "status": 76, "reason": "rank 1 hangs", "resumed_step": 20}],
        "earlier_starts": [{"started_at": "A", "resume_step": 0}, {"started_at": "B", "resume_step": 10}],
    }
    run = read_run(write_run(tmp_path / "run", plain_records(range(1, 31)), manifest))
    assert events_of(run) == [
        Mark(10, "start", "started again at B"),
        Mark(20, "start", "restarted at C: rank 1 hangs"),
    ]


def test_starts_of_a_discarded_past_are_not_marked(tmp_path: Path) -> None:
    manifest = {
        "started_at": "D",
        "resume_step": 15,
        "earlier_starts": [
            {"started_at": name, "resume_step": step} for name, step in (("A", 0), ("B", 10), ("C", 20))
        ],
    }
    run = write_run(tmp_path / "run", plain_records(range(1, 31)), manifest)
    assert [(mark.step, mark.text[-1]) for mark in events_of(read_run(run))] == [(10, "B"), (15, "D")]
    anew = write_run(
        tmp_path / "anew", plain_records(range(1, 31)), manifest | {"resume_step": 0}, checkpoint__resume="never"
    )
    assert events_of(read_run(anew)) == []


def test_failed_saves_are_marked_where_their_count_grows(tmp_path: Path) -> None:
    counts = {5: 0, 10: 1, 15: 1, 20: 3, 25: 0, 30: 1}  # from 25 on, of another start
    records = [record(step, checkpoint__failed_saves=count) for step, count in counts.items()]
    assert events_of(read_run(write_run(tmp_path / "run", records))) == [
        Mark(10, "fault", "1 save failed"),
        Mark(20, "fault", "2 saves failed"),
        Mark(30, "fault", "1 save failed"),
    ]


def test_skips_are_told_where_their_count_grows(tmp_path: Path) -> None:
    counts = {5: 2, 10: 2, 15: 3, 16: 4}
    records = [record(step, train__lm_loss=1.0, train__skipped_steps=count) for step, count in counts.items()]
    marks = events_of(read_run(write_run(tmp_path / "run", records)))
    assert [(mark.step, mark.text) for mark in marks] == [
        (5, "2 steps without an update in steps 1 to 5"),
        (15, "1 step without an update in steps 11 to 15"),
        (16, "1 step without an update"),
    ]
    assert {mark.kind for mark in marks} == {"skip"}


def test_faults_say_what_was_found_and_done(tmp_path: Path) -> None:
    records = [record(3, faults__loss_spike=12.0, faults__rewind=1), record(4, faults__rewind=1)]
    marks = events_of(read_run(write_run(tmp_path / "run", records)))
    assert marks == [Mark(3, "fault", "loss spike: rewound to a checkpoint")]


def test_milestones_are_those_of_the_preview(tmp_path: Path) -> None:
    run = read_run(
        write_run(tmp_path / "run", plain_records(range(1, 11)), optim__lr_warmup_tokens=TOKENS_PER_STEP * 5)
    )
    marks = milestones_of(run)
    assert Mark(5, "milestone", "warm-up ends") in marks
    assert marks[-1] == Mark(40, "milestone", "last step")
    (run.directory / "config.yaml").write_text("nonsense: 1\n")
    assert known_milestones_of(read_run(run.directory)) == []
