"""Write the generated tables of docs/ from the code that they describe: `make docs`.

A table stands between two comments in its page; the text around it is written by hand. `--check` writes nothing and
exits 1 where a page is out of date.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lmscale.config.deepspeed_keys import KEYS
from lmscale.config.io import documentation
from lmscale.config.layouts import RULES, legal_table
from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.config.presets import with_defaults
from lmscale.monitor.metrics import METRICS
from lmscale.plan.activations import StepShape, korthikanti_bytes, saved_bytes
from lmscale.plan.device_types import DEVICE_TYPES
from lmscale.plan.params import num_parameters
from lmscale.plan.published import published_runs
from lmscale.plan.stages import PlannedLayer, stage_parameters

DOCS = Path(__file__).resolve().parent.parent / "docs"
END = "<!-- end of generated -->"


def layouts() -> str:
    """Tabulate the legal layouts, then the rules behind the noes."""
    rows = legal_table()
    header = list(rows[0])
    rules = ([rule.name, rule.because, rule.instead] for rule in RULES)
    return (
        _table(header, ([row[name] for name in header] for row in rows))
        + "\nTensor and sequence parallelism and recompute combine with each of them.\n\n"
        + _table(["cannot be trained", "because", "instead"], rules)
    )


def deepspeed_keys() -> str:
    """Tabulate what becomes of each key of DeepSpeed's JSON."""
    rows = []
    for key in KEYS.values():
        kind = "" if key.kind == "any" else key.kind
        rows.append([f"`{key.path}`", key.status, kind, "; ".join(filter(None, (key.note, key.remedy)))])
    return _table(["key", "status", "type", "note"], rows)


def deepspeed_refusals() -> str:
    """Tabulate what is refused by its reason, the keys of a feature in one line."""
    reasons: dict[str, list[str]] = {}
    for key in KEYS.values():
        if key.status == "refused":
            reasons.setdefault(key.note, []).append(f"`{key.path}`")
    return _table(["refused because", "keys"], ([reason, ", ".join(keys)] for reason, keys in reasons.items()))


def config_keys() -> str:
    """Tabulate every key of a run's config."""
    rows = ([f"`{key}`", f"`{kind}`", default and f"`{default}`", text] for key, kind, default, text in documentation())
    return _table(["key", "type", "default", "meaning"], rows)


def published() -> str:
    """Tabulate predicted step times against those of published runs, errors included."""
    rows = []
    for run in published_runs():
        step, predicted = run.step, run.predict().total
        layout = f"TP {step.tp_size}, PP {step.pp_size}, DP {run.dp_size}"
        cells = [run.source, run.name, f"{run.num_devices} {run.device}", layout, f"{run.seconds:.4g}"]
        rows.append([*cells, f"{predicted:.4g}", f"{100 * (predicted / run.seconds - 1):+.1f} %", run.known])
    return _table(["source", "run", "devices", "layout", "published s", "predicted s", "error", "known reason"], rows)


def device_types() -> str:
    """Tabulate the devices that the planner knows."""
    rows = []
    for kind in DEVICE_TYPES.values():
        flops = ", ".join(f"{name} {value / 1e12:.4g}" for name, value in kind.flops_per_second.items())
        rates = (kind.memory_bytes_per_second, kind.node_bytes_per_second, kind.network_bytes_per_second)
        cells = [f"`{kind.name}`", flops, f"{kind.memory_bytes / 2**30:.0f}", *(f"{rate / 1e9:g}" for rate in rates)]
        rows.append([*cells, str(kind.devices_per_node), f"{kind.matmul_fraction:g}"])
    names = [
        "TFLOP/s",
        "memory GiB",
        "memory GB/s",
        "in a node GB/s",
        "between nodes GB/s",
        "a node",
        "matmul_fraction",
    ]
    return _table(["device", *names], rows)


def _preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(with_defaults({"preset": name}))


def parameters_of_a_rank() -> str:
    """Tabulate what the first, a middle and the last stage's ranks hold of some presets."""
    rows = []
    for name, tp_size, pp_size in (
        ("gpt3-1.3b", 1, 1),
        ("gpt3-13b", 8, 4),
        ("gpt3-175b", 8, 16),
        ("bert-large", 4, 8),
        ("bart-large", 8, 4),
        ("t5-11b", 32, 16),
        ("t5-v1.1-xxl", 32, 24),
    ):
        model = _preset(name)
        held = stage_parameters(model, tp_size, pp_size)
        chosen = (held[0], held[pp_size // 2], held[-1])
        cells = [f"`{name}`", f"{num_parameters(model):,}", f"TP {tp_size}, PP {pp_size}"]
        rows.append([*cells, *(f"{count:,}" for count in chosen)])
    return _table(["preset", "parameters", "layout", "first stage", "middle stage", "last stage"], rows)


def activations_of_a_layer() -> str:
    """Tabulate a layer's activations by our formula, fused and unfused, beside the published one."""
    dropouts = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    model = _preset("gpt3-175b").model_copy(update=dropouts)
    rows = []
    for tp_size, split in ((1, False), (8, False), (8, True)):
        for recompute in ("none", "selective", "full"):
            shape = StepShape(
                SampleLengths(2049, 2048, 0, 2048),
                1,
                1,
                tp_size=tp_size,
                sequence_parallel=split,
                recompute=recompute,
            )
            unfused = replace(shape, kernel_keeps_scores=True)
            ours = [saved_bytes(model, step, [PlannedLayer("layer")])["layers"] for step in (shape, unfused)]
            layout = f"TP {tp_size}" + (", SP" if split else "")
            counts = (*ours, korthikanti_bytes(model, shape))
            rows.append([layout, recompute, *(f"{count / 2**20:,.1f}" for count in counts)])
    return _table(["layout", "recompute", "ours, fused attention", "ours, math attention", "Korthikanti"], rows)


def metric_tags() -> str:
    """Tabulate the metrics' tags."""
    ways = {"same": "the same on all", "sum": "summed over data-parallel ranks", "max": "the largest"}
    rows = ([f"`{metric.tag}`", metric.unit, ways[metric.over_ranks], metric.meaning] for metric in METRICS)
    return _table(["tag", "unit", "over ranks", "meaning"], rows)


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "layouts": ("layouts.md", layouts),
    "deepspeed keys": ("deepspeed.md", deepspeed_keys),
    "deepspeed refusals": ("deepspeed.md", deepspeed_refusals),
    "config keys": ("config.md", config_keys),
    "metrics' tags": ("watching.md", metric_tags),
    "published runs": ("planner.md", published),
    "device types": ("planner.md", device_types),
    "parameters of a rank": ("planner_memory.md", parameters_of_a_rank),
    "activations of a layer": ("planner_memory.md", activations_of_a_layer),
}


def render(section: str) -> tuple[Path, str]:
    """Return a section's page and the text that the page should have.

    Raises:
        ValueError: if the page has no place for the section.
    """
    name, make = SECTIONS[section]
    begin = f"<!-- generated by tools/make_docs.py: {section} -->"
    path = DOCS / name
    place = re.compile(re.escape(begin) + ".*?" + re.escape(END), re.DOTALL)
    page = path.read_text(encoding="utf-8")
    if not place.search(page):
        raise ValueError(f"{path} has no section {section!r}")
    return path, place.sub(lambda _: f"{begin}\n{make()}{END}", page)


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check compare them."""
    stale = []
    for section in SECTIONS:
        path, page = render(section)
        if path.read_text(encoding="utf-8") != page:
            stale.append(path.relative_to(DOCS).as_posix())
            if "--check" not in arguments:
                path.write_text(page, encoding="utf-8")
    if stale:
        print(("out of date: " if "--check" in arguments else "wrote: ") + ", ".join(stale))
    return 1 if stale and "--check" in arguments else 0


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
