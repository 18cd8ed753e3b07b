"""Several hosts on one machine, in namespaces, to test launchers and failures on: docs/cluster.md.

    python tools/cluster.py up --hosts 2
    python tools/cluster.py run host-1 pdsh -R ssh -w host-1,host-2 hostname
    python tools/cluster.py down

Each host has a name, an address, an sshd, processes and /tmp of its own. It sees the machine's other files.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).parent))
from cluster_network import DIRECTORY, Cluster, ClusterError

Name = Annotated[str, typer.Argument(metavar="HOST")]
Directory = Annotated[Path, typer.Option(help="The cluster's files, for several clusters side by side.")]

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@app.command()
def up(
    hosts: Annotated[int, typer.Option(help="How many.")] = 2,
    share: Annotated[
        list[Path] | None, typer.Option(help="A directory that all hosts see alike, though it may lie in /tmp.")
    ] = None,
    private: Annotated[
        list[Path] | None, typer.Option(help="A directory that each host has of its own, empty at first.")
    ] = None,
    directory: Directory = DIRECTORY,
) -> None:
    """Start host-1, host-2 and so on."""
    cluster = Cluster.up(hosts, share or (), private or (), directory)
    for host in cluster.hosts.values():
        typer.echo(f"{host.address} {host.name}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(host: Name, command: Annotated[list[str], typer.Argument()], directory: Directory = DIRECTORY) -> None:
    """Run a command on a host, in this directory and environment."""
    argv = Cluster.load(directory).command(host, command)
    os.execvp(argv[0], argv)


@app.command()
def slow(
    host: Name, rate: Annotated[str, typer.Argument(help="As in 100mbit.")], directory: Directory = DIRECTORY
) -> None:
    """Limit a host's link."""
    Cluster.load(directory).slow(host, rate)


@app.command()
def lose(host: Name, percent: int, directory: Directory = DIRECTORY) -> None:
    """Drop a share of the packets that come to a host."""
    Cluster.load(directory).lose(host, percent)


@app.command()
def cut(host: Name, directory: Directory = DIRECTORY) -> None:
    """Pull a host's cable."""
    Cluster.load(directory).cut(host)


@app.command()
def mend(host: Name, directory: Directory = DIRECTORY) -> None:
    """Undo slow, lose and cut."""
    Cluster.load(directory).mend(host)


@app.command()
def kill(host: Name, directory: Directory = DIRECTORY) -> None:
    """Take a host away without a word to its peers."""
    Cluster.load(directory).kill(host)


@app.command()
def boot(host: Name, directory: Directory = DIRECTORY) -> None:
    """Start a host again that was killed, with its files."""
    Cluster.load(directory).boot(host)


@app.command()
def down(directory: Directory = DIRECTORY) -> None:
    """End all hosts, and remove everything of them."""
    Cluster.load(directory).down()


if __name__ == "__main__":
    try:
        app()
    except ClusterError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
