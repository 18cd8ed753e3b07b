"""`lmscale plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lmscale.errors import ConfigError

_BAR = (
    ("parameters", "p"),
    ("gradients", "g"),
    ("optimizer", "o"),
    ("activations", "a"),
    ("logits", "l"),
    ("buffers", "b"),
    ("allowance", "f"),
)
"""What a device holds, and its letter in the bar."""
_BAR_WIDTH = 20
_ROWS = 10
"""Rows that are shown where --top is left out."""
_GIB = 2**30


def plan(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml|PRESET", help="A run's config, or the name of a model.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys to override, as in precision=fp16.")
    ] = None,
    devices: Annotated[int | None, typer.Option(help="Devices, over all nodes.")] = None,
    device_type: Annotated[
        str, typer.Option(help="A100-40, A100-80, H100, H200, B200, MI300X, V100, cpu, or a YAML file of your own.")
    ] = "H100",
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the formulas behind the best row, with numbers and sources.")
    ] = False,
    write: Annotated[
        Path | None, typer.Option(metavar="RUN.yaml", help="Write the run on the best layout to this file.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Rows to show. Left out: 10.")] = None,
    largest: Annotated[bool, typer.Option("--largest", help="Find the largest model that fits the devices.")] = False,
    fewest: Annotated[
        bool,
        typer.Option(
            "--fewest", help="Find the fewest devices that the model fits on, to an eighth and in whole nodes."
        ),
    ] = False,
    simulate: Annotated[
        str | None,
        typer.Option(
            "--simulate-ranks",
            metavar="RANKS",
            help="Build these ranks of the run as it is laid out, as in 0,mid,last, without their memory.",
        ),
    ] = None,
) -> int:
    """Rank the layouts of a run by the predicted time of a step: memory by kind, bubble, communication, days."""
    from lmscale.optim.lr import check_cooldown
    from lmscale.plan.device_types import device_type as find
    from lmscale.plan.questions import base_run, check_devices, fewest_devices
    from lmscale.plan.search import no_layout, search

    if top is not None and top < 1:
        raise ConfigError("must be at least 1", field="--top", value=top)
    if largest and fewest:
        raise ConfigError("ask for one of --largest and --fewest", field="--fewest")
    for option, is_given, others in (
        ("--largest", largest, {"--write": write, "--explain": explain, "--simulate-ranks": simulate, "--top": top}),
        ("--fewest", fewest, {"--devices": devices, "--simulate-ranks": simulate}),
        ("--json", as_json, {"--explain": explain}),
        ("--simulate-ranks", simulate is not None, {"--write": write, "--explain": explain, "--top": top}),
    ):
        for other, value in others.items():
            if is_given and value not in (None, False):
                raise ConfigError(f"is not read with {option}", field=other, remedy="leave one of the two out")
    if devices is None and not fewest:
        raise ConfigError("is missing", field="--devices", remedy="give a number, or --fewest")
    if devices is not None:
        check_devices(devices)
    device = find(device_type)
    config = base_run(run, device, overrides or ())
    check_cooldown(config.optim, config.train.train_tokens)
    if simulate is not None:
        return _simulate(config, devices, simulate, as_json)
    if largest and devices is not None:
        return _show_largest(config, devices, device, as_json)
    if fewest:
        devices, found = fewest_devices(config, device)
    else:
        assert devices is not None
        found = search(config, devices, device)
    if not found.rows:
        raise no_layout(found, devices, device)
    if write is not None:
        _write(write, config, found.rows[0], devices, device.name)
    if as_json:
        _print_json(config, devices, device.name, found.rows[: top or _ROWS])
        return 0
    _print_table(config, devices, device.name, found, top or _ROWS)
    if explain:
        from lmscale.plan.explain import explain as lines_of

        for line in lines_of(config, found.rows[0], device):
            typer.echo(line)
    if write is not None:
        typer.echo(f"wrote {write}: lmscale train {write} --devices {devices}")
    return 0


def _simulate(config: Any, devices: int | None, wanted: str, as_json: bool) -> int:
    """Build ranks of the run's own layout and show what each has."""
    from dataclasses import asdict

    from lmscale.config.check import check_run
    from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
    from lmscale.train.simulate import show_ranks, simulate_ranks

    if devices is None:
        raise ConfigError("is missing", field="--devices", remedy="say how many ranks the run has")
    check_run(config, check_deepspeed(load_deepspeed(config.deepspeed), config), devices, elsewhere=True)
    names = {"first": 0, "mid": devices // 2, "last": devices - 1}
    try:
        ranks = [names[word] if word in names else int(word) for word in wanted.split(",")]
    except ValueError:
        raise ConfigError(
            "must be numbers, first, mid or last, with commas between", field="--simulate-ranks", value=wanted
        ) from None
    rows = simulate_ranks(config, devices, ranks)
    typer.echo(json.dumps([asdict(row) for row in rows], indent=2) if as_json else show_ranks(rows))
    return 0


def _print_json(config: Any, devices: int, device_name: str, rows: list[Any]) -> None:
    from lmscale.plan.explain import as_json
    from lmscale.plan.params import num_parameters

    answer = {
        "devices": devices,
        "device_type": device_name,
        "num_parameters": num_parameters(config.model),
        "global_batch_size": config.batch.global_batch_size,
        "train_tokens": config.train.train_tokens,
        "precision": config.precision,
        "rows": [as_json(row) for row in rows],
    }
    typer.echo(json.dumps(answer, indent=2))


def _print_table(config: Any, devices: int, device_name: str, found: Any, top: int) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Column, Table

    from lmscale.plan.params import num_parameters

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    title = (
        f"{num_parameters(config.model) / 1e9:.3g}B parameters, {config.precision}, batch "
        f"{config.batch.global_batch_size}, on {devices} {device_name}: {len(found.rows)} layouts fit"
    )
    right = ("TP", "PP", "DP", "ZeRO", "micro", "GiB")
    columns = [Column(name, justify="right", no_wrap=True) for name in right]
    columns += [Column(name, no_wrap=True) for name in ("recompute", "device memory")]
    columns += [Column(name, justify="right", no_wrap=True) for name in ("step s", "bubble", "comm.", "MFU", "days")]
    table = Table(*columns, title=title, box=SIMPLE, padding=(0, 1), title_justify="left")
    for row in found.rows[:top]:
        table.add_row(*_cells(row))
    console.print(table)
    letters = ", ".join(f"{letter} {name}" for name, letter in _BAR)
    best = found.rows[0]
    for line in (
        f"device memory: {letters}; s: sequence parallelism; o, p behind ZeRO: optimizer, parameters offloaded",
        f"best: {best.candidate}",
        f"  {best.tokens_per_second:,.0f} tokens/s, {best.train_seconds / 86400:.1f} days and "
        f"{best.device_hours:,.0f} device-hours for {config.train.train_tokens:,} tokens, checkpoints of "
        f"{best.checkpoint_bytes / _GIB:,.0f} GiB",
        "  sent by a rank in a step: "
        + ", ".join(
            f"{axis} {best.axis_bytes(axis) / 1e9:.3g} GB in {getattr(best.time, axis):.3g} s"
            for axis in ("tensor", "pipeline", "data")
        ),
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(row: Any) -> list[str]:
    step, zero, time = row.candidate.step, row.candidate.zero, row.time
    offload = ("o" if zero.offload_optimizer else "") + ("p" if zero.offload_param else "")
    waiting = (time.tensor + time.pipeline + time.data) / time.total
    return [
        f"{step.tp_size}{'s' if step.sequence_parallel else ''}",
        str(step.pp_size),
        str(row.candidate.dp_size),
        f"{zero.stage}{offload}",
        f"{step.micro_batch_size}",
        f"{row.memory.total / _GIB:.1f}",
        step.recompute,
        _bar(row.memory),
        f"{time.total:.3g}",
        f"{row.bubble_fraction:.1%}",
        f"{waiting:.1%}",
        f"{row.mfu_fraction:.1%}",
        _days(row.train_seconds),
    ]


def _days(seconds: float) -> str:
    days = seconds / 86400
    return f"{days:,.3g}" if days >= 1 else f"{24 * days:.2g} h"


def _bar(memory: Any) -> str:
    """Draw what a device holds as letters, each a twentieth of it."""
    bar, end = "", 0.0
    for name, letter in _BAR:
        end += getattr(memory, name) / memory.total * _BAR_WIDTH
        bar += letter * (round(end) - len(bar))
    return bar


def _write(path: Path, config: Any, row: Any, devices: int, device_name: str) -> None:
    from lmscale.config.io import show
    from lmscale.plan.questions import written_run

    text = (
        f"# Written by lmscale plan.\n# devices: {devices}\n# {row.candidate}\n"
        f"# Predicted on {device_name}: {row.time.total:.3g} s a step, {row.memory.total / _GIB:.1f} GiB on the fullest device.\n"
    )
    try:
        path.write_text(text + show(written_run(config, row)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error}", field="--write", value=str(path)) from None


def _show_largest(config: Any, devices: int, device: Any, as_json: bool) -> int:
    from lmscale.plan.explain import as_json as row_json
    from lmscale.plan.params import num_parameters
    from lmscale.plan.questions import largest_model, largest_preset
    from lmscale.plan.search import no_layout, search

    published = largest_preset(config, devices, device)
    free = largest_model(config, devices, device) if config.model.architecture == "gpt" else None
    if published is None and free is None:
        found = search(config, devices, device, stop_at_first=True)
        if not found.rows:
            raise no_layout(found, devices, device)
        raise ConfigError(f"no model fits on {device.name}", field="--devices", value=devices)
    answer: dict[str, Any] = {}
    if published is not None:
        name, found = published
        answer["preset"] = {"name": name, "row": row_json(found.rows[0])}
        typer.echo(f"largest preset: {name}, as {found.rows[0].candidate}") if not as_json else None
    if free is not None:
        model, found = free
        sizes = {"num_layers": model.num_layers, "hidden_size": model.hidden_size}
        sizes |= {"num_attention_heads": model.num_attention_heads, "num_parameters": num_parameters(model)}
        answer["gpt"] = {**sizes, "row": row_json(found.rows[0])}
        if not as_json:
            typer.echo(
                f"largest gpt of GPT-3's proportions: {num_parameters(model) / 1e9:.4g}B parameters, {model.num_layers} layers "
                f"of {model.hidden_size}, as {found.rows[0].candidate}"
            )
    if as_json:
        typer.echo(json.dumps({"devices": devices, "device_type": device.name, **answer}, indent=2))
    return 0
