"""The console command `lmscale`. Nothing but typer is imported before a command is chosen: --help answers at once."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from lmscale import __version__
from lmscale.errors import EXIT_BAD_INPUT, EXIT_FAILURE, LmscaleError


class _Entry(NamedTuple):
    module: str
    attribute: str
    help: str


COMMANDS: dict[str, _Entry] = {
    "train": _Entry("launch_commands", "train", "Check a run, start its ranks and stay with them to the end."),
    "preview": _Entry("preview", "preview", "Show a run's rate, batch, length and tokens by step."),
    "plan": _Entry("plan_commands", "plan", "Rank a run's layouts on some devices by memory and time."),
    "tokenizer": _Entry("data_commands", "tokenizer_app", "Train a tokenizer."),
    "tokenize": _Entry("data_commands", "tokenize", "Turn text into the token ids that training reads."),
    "data": _Entry("data_commands", "data_app", "Look into tokenized corpora."),
    "generate": _Entry("model_commands", "generate", "Write text with a checkpoint."),
    "evaluate": _Entry("model_commands", "evaluate", "Measure a checkpoint on held-out text."),
    "checkpoint": _Entry("checkpoint_commands", "checkpoint_app", "List a run's checkpoints, verify and reshape them."),
    "import-hf": _Entry("convert_commands", "import_hf", "Make a checkpoint from a Hugging Face directory."),
    "export-hf": _Entry("convert_commands", "export_hf", "Make a Hugging Face directory from a checkpoint."),
    "adapter": _Entry(
        "adapter_commands",
        "adapter_app",
        "Compare methods; look at adaptations, merge, exchange.",
    ),
    "verify": _Entry("model_commands", "verify", "Train a shrunk copy of a run on every legal layout and compare."),
    "report": _Entry("report_commands", "report", "Write a page on a run: curves, events, plan, environment."),
    "compare": _Entry("report_commands", "compare", "Say where two runs first differ, and overlay them."),
    "doctor": _Entry("launch_commands", "doctor", "Show what this machine has and lacks for training."),
}
"""By name, in the order of --help."""


class _LazyGroup(TyperGroup):
    """Subcommands that are imported when they are called, not when they are listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else _load(cmd_name, entry)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _load(name: str, entry: _Entry) -> Any:
    target = getattr(importlib.import_module(f"lmscale.cli.{entry.module}"), entry.attribute)
    holder = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
    if isinstance(target, typer.Typer):
        holder.add_typer(target, name=name, help=entry.help)
    else:
        holder.command(name)(target)
    group: Any = typer.main.get_group(holder)
    return group.commands[name]


app = typer.Typer(
    cls=_LazyGroup,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lmscale {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Pretrain and adapt language models on DeepSpeed and megatron-core."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the console command.

    Args:
        argv: the arguments; None takes the process's own.

    Returns:
        The exit status: 0 done, 1 failure, 2 wrong input (one `error:` line on stderr), 75 interrupted and saved.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]  # typer exports this subclass alone
    try:
        status = app(arguments or ["--help"], prog_name="lmscale", standalone_mode=False)
    except LmscaleError as error:
        return _fail(str(error), error.exit_status)
    except usage_error as error:
        return _fail(_usage_line(error), EXIT_BAD_INPUT)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("interrupted", EXIT_FAILURE)
    return status if isinstance(status, int) else 0


def _usage_line(error: Any) -> str:
    # A group that is called without a command "fails" with its whole help as the message.
    shows_help = type(error).__name__ == "NoArgsIsHelpError"
    message = "missing command" if shows_help else " ".join(error.format_message().split()).rstrip(".")
    command = error.ctx.command_path if getattr(error, "ctx", None) is not None else "lmscale"
    return f"{message[:1].lower()}{message[1:]}; see {command} --help"


def _fail(line: str, status: int) -> int:
    sys.stderr.write(f"error: {line}\n")
    return status
