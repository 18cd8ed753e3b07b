"""How TensorBoard's custom scalars are laid out: loss, rate and batch, throughput, health."""

from __future__ import annotations

from typing import Any

from lmscale.monitor import metrics

LAYOUT: dict[str, dict[str, list[str]]] = {
    "Loss": {
        "training": [metrics.TRAIN_LM_LOSS],
        "training, by tokens": [metrics.TRAIN_LM_LOSS + metrics.BY_TOKENS_SUFFIX],
        "held out": ["valid/.+/lm_loss"],
        "held out, by tokens": ["valid/.+/lm_loss" + metrics.BY_TOKENS_SUFFIX],
    },
    "Rate and batch": {
        "learning rate": [metrics.TRAIN_LR],
        "batch size, sequences": [metrics.TRAIN_GLOBAL_BATCH_SIZE],
        "tokens consumed": [metrics.PROGRESS_CONSUMED_TOKENS],
    },
    "Throughput": {
        "tokens a second": [metrics.PERF_TOKENS_PER_SECOND],
        "MFU and HFU": [metrics.PERF_MFU_FRACTION, metrics.PERF_HFU_FRACTION],
        "step time, s": [metrics.PERF_STEP_TIME_S],
        "waiting for data, fraction": [metrics.PERF_DATA_WAIT_FRACTION],
        "own time of a step, slowest rank and median, s": [metrics.PERF_OWN_TIME_MAX_S, metrics.PERF_OWN_TIME_MEDIAN_S],
        "pipeline bubble, fraction": [metrics.PERF_BUBBLE_FRACTION],
    },
    "Health": {
        "gradient norm": [metrics.TRAIN_GRAD_NORM],
        "parameter norm": [metrics.TRAIN_PARAM_NORM],
        "loss scale": [metrics.TRAIN_LOSS_SCALE],
        "steps without an update": [metrics.TRAIN_SKIPPED_STEPS],
        "faults": ["faults/.+"],
        "memory, bytes": [metrics.MEMORY_PEAK_BYTES],
        "standing for saves, s": [metrics.CHECKPOINT_STALL_S],
    },
}
"""Category -> chart -> expressions that its tags match from beginning to end."""


def layout_proto() -> Any:
    """Make TensorBoard's message of the layout."""
    from tensorboard.plugins.custom_scalar import layout_pb2  # type: ignore[import-untyped]

    def chart(title: str, tags: list[str]) -> Any:
        whole = [f"^{tag}$" for tag in tags]
        return layout_pb2.Chart(title=title, multiline=layout_pb2.MultilineChartContent(tag=whole))

    return layout_pb2.Layout(
        category=[
            layout_pb2.Category(title=title, chart=[chart(name, tags) for name, tags in charts.items()])
            for title, charts in LAYOUT.items()
        ]
    )
