"""The tags that Megatron-DeepSpeed's dashboards read, beside ours (monitor.megatron_names).

Source: Megatron-DeepSpeed, megatron/training.py, `training_log` and `evaluate_and_print_results`; with several held-out
corpora the corpus stands in the middle, as in BigScience's fork.
"""

from __future__ import annotations

from lmscale.monitor import metrics
from lmscale.monitor.metrics import Point, Record

_NAMES = {
    metrics.TRAIN_LM_LOSS: "lm-loss-training/lm loss",
    metrics.TRAIN_LR: "learning-rate/learning-rate",
    metrics.TRAIN_GLOBAL_BATCH_SIZE: "batch-size/batch-size",
    metrics.TRAIN_LOSS_SCALE: "loss-scale/loss-scale",
    metrics.TRAIN_GRAD_NORM: "grad-norm/grad-norm",
    metrics.TRAIN_PARAM_NORM: "params-norm/params-norm",
    metrics.PERF_STEP_TIME_S: "iteration-time/iteration-time",
}


def points(record: Record) -> list[Point]:
    """List a record's points under Megatron-DeepSpeed's names: by step, "... vs samples" and "... vs tokens"."""
    corpora = [corpus for corpus in map(metrics.valid_corpus, record.values) if corpus is not None]
    found = []
    for tag, value in record.values.items():
        name = _megatron_name(tag, len(corpora) == 1)
        if name is not None:
            found += [
                Point(name, value, "step", record.step),
                Point(f"{name} vs samples", value, "samples", record.consumed_samples),
                Point(f"{name} vs tokens", value, "tokens", record.consumed_tokens),
            ]
    return found


def _megatron_name(tag: str, is_only_corpus: bool) -> str | None:
    corpus = metrics.valid_corpus(tag)
    if corpus is None:
        return _NAMES.get(tag)
    directory = "lm-loss-validation" if is_only_corpus else f"lm-loss-validation/{corpus}"
    return f"{directory}/lm loss validation"
