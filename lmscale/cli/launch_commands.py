"""`lmscale train` and `lmscale doctor`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.config.io import documentation, load_run, show
from lmscale.errors import ConfigError

if TYPE_CHECKING:
    from lmscale.launcher.compose import Command, Placement
    from lmscale.launcher.validate import LaunchPlan


def train(
    run: Annotated[str | None, typer.Argument(metavar="RUN.yaml", help="The run's config.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys to override, as in optim.lr=3e-4.")
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(
            help="Ranks on each host. Left out: the hostfile's slots, Slurm's tasks, all CUDA devices of this host, or 1."
        ),
    ] = None,
    hostfile: Annotated[str | None, typer.Option(help='Hosts, one to a line: "NAME slots=RANKS".')] = None,
    launcher: Annotated[
        str | None, typer.Option(help="deepspeed, pdsh, openmpi, mpich, slurm or torchrun. Left out: deepspeed.")
    ] = None,
    nnodes: Annotated[
        str | None,
        typer.Option(help="With torchrun, started on each host by itself: the number of hosts, or a range MIN:MAX."),
    ] = None,
    node_rank: Annotated[int | None, typer.Option(help="With --nnodes N: the number of this host, from 0.")] = None,
    master_addr: Annotated[
        str | None,
        typer.Option(help="With several hosts: where the ranks meet. Left out: the hostfile's first host."),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(help="The port there. Left out: a free one, one of the job's under Slurm, 29500 with --nnodes."),
    ] = None,
    deepspeed_config: Annotated[
        str | None,
        typer.Option("--deepspeed_config", "--deepspeed-config", help="DeepSpeed JSON, in the place of the config's."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the run, print what would run on each host and the resolved config, start nothing."
        ),
    ] = False,
    device_type: Annotated[
        str | None,
        typer.Option(
            help="With --dry-run: device whose memory the plan is held against, as of lmscale plan. Left out: this host's."
        ),
    ] = None,
    max_restarts: Annotated[
        int,
        typer.Option(help="Starts after a failure (status 1 or 76), in a row without a new checkpoint in between."),
    ] = 0,
    elastic: Annotated[
        bool,
        typer.Option("--elastic", help="Restart on fewer ranks where some were lost, as far as the layout allows."),
    ] = False,
    min_devices: Annotated[
        int | None, typer.Option(help="With --elastic: ranks that a restart must have, on all hosts together.")
    ] = None,
    help_config: Annotated[
        bool, typer.Option("--help-config", help="Describe every key of a config and exit.")
    ] = False,
) -> int:
    """Check a run, start its ranks and stay with them to the end.

    Mistakes are found before any rank starts. TERM and Ctrl-C finish the step, save and exit with 75; a second Ctrl-C
    kills. USR1 saves and goes on. A hang ends with 76, naming the rank that the others wait for. With --max-restarts a run
    that failed is started again from its newest good checkpoint.
    """
    if help_config:
        _print_documentation()
        return 0
    if run is None:
        raise ConfigError("is missing", field="RUN.yaml", remedy="see lmscale train --help")
    from lmscale.launcher.compose import compose, place
    from lmscale.launcher.restarts import check_policy, check_sizes, keep_running
    from lmscale.launcher.start import join, resolved_config_path
    from lmscale.launcher.validate import validate_run

    config = load_run(run, overrides or ())
    if deepspeed_config is not None:
        config = config.model_copy(update={"deepspeed": deepspeed_config})
    placement = place(
        launcher,
        devices,
        hostfile,
        nnodes=nnodes,
        node_rank=node_rank,
        master_addr=master_addr,
        master_port=master_port,
        max_restarts=max_restarts,
    )
    policy = check_policy(max_restarts, elastic, min_devices, placement)
    check_sizes(config, placement)
    plan = validate_run(config, placement.num_ranks)
    command = compose(plan, placement, resolved_config_path(plan))
    _warn_of_secrets(command)
    if device_type is not None and not dry_run:
        raise ConfigError("is read with --dry-run only", field="--device-type", value=device_type)
    if dry_run:
        typer.echo("\n".join(filter(None, [command.show(), command.show_hosts()])))
        _print_memory(plan, placement, device_type)
        typer.echo(show(plan.config), nl=False)
        return 0
    if command.is_part:
        join(plan, command)
    outcome = keep_running(plan, placement, policy)
    if outcome.error is not None:
        sys.stderr.write(f"error: {outcome.error}\n")
    return outcome.status


def _warn_of_secrets(command: Command) -> None:
    if command.withheld:
        sys.stderr.write(
            f"warning: not passed on to other hosts, though .deepspeed_env names it: {', '.join(command.withheld)}; it looks "
            "like a secret, and would stand on command lines: keep it in a file that only you can read there\n"
        )


def _print_memory(plan: LaunchPlan, placement: Placement, type_name: str | None) -> None:
    """Print the plan's bytes as a comment before the config, and warn where they are more than the device has."""
    from lmscale.launcher.capacity import device_capacity
    from lmscale.plan.run_memory import chosen_layout, memory_line, size
    from lmscale.plan.search import fullest_stage

    capacity = device_capacity(placement, type_name)
    is_cpu = capacity.is_cpu if capacity is not None else not placement.cuda_devices and not placement.hosts
    layout = chosen_layout(plan.config, plan.zero, plan.dp_size, device_type="cpu" if is_cpu else "cuda")
    stage, memory = fullest_stage(plan.config, layout)
    typer.echo("# " + memory_line(memory, stage, layout.step.pp_size))
    if capacity is not None and memory.total > capacity.num_bytes:
        sys.stderr.write(
            f"warning: it will not fit: a device needs {size(memory.total)} by the plan, and {capacity.name} has "
            f"{size(capacity.num_bytes)} for tensors; lmscale plan finds layouts that fit\n"
        )


def doctor(
    layouts: Annotated[
        bool, typer.Option("--layouts", help="Show which layouts can be trained, and nothing else.")
    ] = False,
    hostfile: Annotated[
        Path | None, typer.Option(help='Look at these hosts instead, and at all together: "NAME slots=RANKS" lines.')
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="With --hostfile: a corpus, PREFIX.bin and .idx, that all must see alike; give several."),
    ] = None,
) -> int:
    """Show what this machine has and lacks for training; exit with 1 where training needs something that is missing.

    With --hostfile every host is asked over ssh: versions, code, disk, shared memory, clock, network interfaces, corpora;
    then an all-reduce goes over all of them. Variables that name interfaces travel as in a run.
    """
    if layouts:
        _print_layouts()
        return 0
    if hostfile is not None:
        return _examine_hosts(hostfile, data or [])
    if data:
        raise ConfigError("is read with --hostfile only", field="--data", value=data[0])
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from lmscale.launcher.doctor import examine

    styles = {"ok": "green", "missing": "red", "note": "yellow"}
    table = Table("", "state", "found", "remedy")
    console, is_ready = Console(), True
    with console.status("looking"):
        for finding in examine():
            style = styles[finding.state]
            table.add_row(finding.name, f"[{style}]{finding.state}[/]", escape(finding.value), escape(finding.remedy))
            is_ready = is_ready and finding.state != "missing"
    console.print(table)
    return 0 if is_ready else 1


def _examine_hosts(hostfile: Path, prefixes: list[str]) -> int:
    """Print a row for each host, and then what is wrong, by host."""
    from rich.console import Console
    from rich.table import Table

    from lmscale.launcher.hosts import read_hostfile
    from lmscale.launcher.preflight import examine_hosts

    hosts = read_hostfile(hostfile)
    console = Console()
    with console.status("asking the hosts"):
        found = examine_hosts(hosts, prefixes)
    names = list(dict.fromkeys(finding.name for each in found.hosts for finding in each.findings))
    table = Table("host", *names)
    marks = {"ok": "[green]ok[/]", "missing": "[red]wrong[/]", "note": "[yellow]note[/]"}
    for each in found.hosts:
        states = {finding.name: marks[finding.state] for finding in each.findings}
        table.add_row(each.host, *(states.get(name, "") for name in names))
    console.print(table)
    lines = [(each.host, finding) for each in found.hosts for finding in each.findings if finding.state != "ok"]
    for host, finding in [*lines, ("all hosts", found.all_reduce)]:
        remedy = f"; {finding.remedy}" if finding.remedy else ""
        line = f"{host}: {finding.name}: {finding.value}{remedy}"
        console.print(
            line, style=None if finding.state != "missing" else "red", markup=False, highlight=False, soft_wrap=True
        )
    return 0 if found.is_ready else 1


def _print_layouts() -> None:
    from rich.console import Console
    from rich.table import Table

    from lmscale.config.layouts import RULES, legal_table

    rows = legal_table()
    table = Table(
        *rows[0], title="Layouts that can be trained", caption="PP: with a pipeline (parallel.pp_size above 1)"
    )
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    for rule in RULES:
        console.print(f"{rule.name}: no, because {rule.because}; {rule.instead}.", highlight=False, markup=False)


def _print_documentation() -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table(Column("key", no_wrap=True), "type", "default", "meaning")
    for row in documentation():
        table.add_row(*(escape(cell) for cell in row))
    Console().print(table)
