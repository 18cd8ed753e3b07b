"""`lmscale generate`, `lmscale evaluate` and `lmscale verify`: parse, call, print.

Under torchrun (`torchrun --no-python --nproc-per-node 2 lmscale generate ...`) the ranks share the model by tensor
parallelism, and rank 0 prints.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lmscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from lmscale.evaluate.lm_eval import TaskResult
    from lmscale.evaluate.model import TrainedModel
    from lmscale.evaluate.perplexity import HeldOutLoss


class Precision(StrEnum):
    """Arithmetic of the model."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


Checkpoint = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run's directory: its newest one.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Left out: the GPU where there is one.")]
Base = Annotated[
    Path | None, typer.Option(metavar="BASE", help="Of an adaptation: its base's checkpoint. Left out: where it was.")
]
PrecisionOption = Annotated[Precision | None, typer.Option(help="Left out: the run's.")]


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[
        str | None,
        typer.Option(
            help="The text to continue (gpt) or to complete: gaps are written <mask>, or <extra_id_0> ... (t5)."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Left out: 128, or what there is of the model's positions. Not read by bert and roberta."),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 takes the likeliest token; lower is less varied. Left out: 1; with bert and roberta, 0."),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Draw among the K likeliest tokens. Greedy bert and roberta: show them, for each mask."),
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest tokens that add up to P.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds, equal text. Left out: another text each time.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH",
            help="An adaptation of the base CHECKPOINT. Repeatable. With --prompt, the text of each is written.",
        ),
    ] = None,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "--input", metavar="FILE.jsonl", help='Prompts in the place of --prompt: {"prompt": ..., "adapter": NAME}.'
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="With --input: where to write. Left out: stdout.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --input: prompts computed at a time.")] = 32,
    slots: Annotated[int, typer.Option(min=1, help="Adaptations in memory at a time.")] = 64,
    base: Base = None,
    device: Device = None,
    precision: PrecisionOption = None,
) -> None:
    """Write text. What is written depends on the checkpoint's architecture.

    gpt: the prompt and how the model goes on from it, to the end of the document or of the room. bert, roberta: the
    prompt with its masks filled. bart: the text that the model makes of the prompt. t5: likewise or, where the prompt
    has sentinels, the prompt with their spans filled in.
    """
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {name: value for name, value in {**options, "seed": seed}.items() if value is not None}
    adapters = _named(adapter)
    if prompt is None and input_file is None:
        raise ConfigError("missing option '--prompt', or '--input'; see lmscale generate --help")
    if prompt is not None and input_file is not None:
        raise ConfigError("stands in the place of --prompt", field="--input", value=str(input_file), remedy="drop one")
    if output is not None and input_file is None:
        raise ConfigError("is read with --input only", field="--output", value=str(output), remedy="leave it out")
    more = {"base": base, "adapters": adapters, "slots": slots} if adapters else {"base": base}
    if input_file is not None:
        _answer_file(checkpoint, device, precision, more, input_file, output, batch_size, options)
        return
    assert prompt is not None
    with _opened(checkpoint, device, precision, **more) as model:
        lines = _candidates(model, prompt, options) if model.config.model.is_encoder_only and not adapters else []
        if len(adapters) > 1:
            texts = model.generate([prompt] * len(adapters), adapters=list(adapters), **options)
            lines = [f"{name}: {text}" for name, text in zip(adapters, texts, strict=True)]
        else:
            chosen = {"adapters": next(iter(adapters))} if adapters else {}
            lines = [*model.generate(prompt, **options, **chosen), *lines]
    if _is_first_rank():
        typer.echo("\n".join(lines))


def _named(adapter: list[str] | None) -> dict[str, str]:
    """Read NAME=PATH options."""
    named: dict[str, str] = {}
    for one in adapter or ():
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise ConfigError("must be NAME=PATH", field="--adapter", value=one)
        if name in named:
            raise ConfigError("names two adaptations", field="--adapter", value=name)
        named[name] = path
    return named


def _answer_file(
    checkpoint: Path,
    device: str | None,
    precision: Precision | None,
    more: dict[str, Any],
    input_file: Path,
    output: Path | None,
    batch_size: int,
    options: dict[str, Any],
) -> None:
    """Write a JSON line for each of a file's prompts, as they are done."""
    import json

    if not input_file.is_file():
        raise ConfigError("does not exist", field="--input", value=str(input_file))
    with _opened(checkpoint, device, precision, **more) as model, contextlib.ExitStack() as stack:
        from lmscale.evaluate.prompt_file import answer, read_requests

        answers = answer(model, read_requests(input_file), batch_size, options)
        lines = (json.dumps(keys, ensure_ascii=False) + "\n" for keys in answers)
        first = next(lines)  # what is wrong shows before a file is made
        write: Callable[[str], Any] = functools.partial(typer.echo, nl=False)
        if output is not None and _is_first_rank():
            write = stack.enter_context(output.open("w", encoding="utf-8")).write
        for line in itertools.chain([first], lines):
            if _is_first_rank():
                write(line)


def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PREFIX", help="A tokenized corpus. Repeatable. Left out: the run's held-out corpora."),
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            metavar="TASKS", help="Run these tasks of lm-evaluation-harness instead, as in piqa,lambada_openai."
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="With --lm-eval: a directory with more tasks, in YAML.")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(metavar="N", help="With --lm-eval: questions of each task; below 1, a share of them."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, metavar="K", help="With --lm-eval: examples before each question. Left out: the task's."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples read at a time. Left out: the run's micro batch.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    base: Base = None,
    device: Device = None,
    precision: PrecisionOption = None,
) -> None:
    """Measure a checkpoint: loss and perplexity on tokenized text, every sample once; or tasks of a harness."""
    if lm_eval is not None:
        if data:
            raise ConfigError(
                "is not read with --lm-eval", field="--data", value=data[0], remedy="leave one of them out"
            )
        tasks = [task for task in lm_eval.split(",") if task]
        results = _run_tasks(checkpoint, device, precision, base, tasks, tasks_dir, limit, num_fewshot, batch_size)
        if _is_first_rank():
            _print_results(results, as_json)
        return
    for name, value in (("--tasks-dir", tasks_dir), ("--limit", limit), ("--num-fewshot", num_fewshot)):
        if value is not None:
            raise ConfigError("is read with --lm-eval only", field=name, value=str(value), remedy="leave it out")
    with _opened(checkpoint, device, precision, base=base) as model:
        from lmscale.evaluate.perplexity import measure_corpus

        prefixes = data or [source.prefix for source in model.config.data.valid]
        if not prefixes:
            raise ConfigError("is missing, and the run has no data.valid", field="--data", remedy="name a PREFIX")
        measured = [measure_corpus(model, prefix, batch_size, show_progress=True) for prefix in prefixes]
    if _is_first_rank():
        _print_losses(measured, as_json)


def verify(
    run: Annotated[str, typer.Argument(metavar="RUN.yaml", help="The run's config.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key=value ...]", help="Keys to override, as in model.num_layers=8.")
    ] = None,
    layouts: Annotated[
        str | None,
        typer.Option(
            help='Layouts to try, as in "tp2-sp,pp2,tp2-pp2,dp2-zero3,pp1" (pp1: a pipeline of one stage; also '
            "recompute, norecompute). Without zeroN, the lowest stage that trains. Left out: every layout that can be."
        ),
    ] = None,
    max_ranks: Annotated[int, typer.Option(help="Ranks that a layout may take, all on this machine.")] = 4,
    steps: Annotated[int, typer.Option(help="Optimizer steps on each layout.")] = 5,
    precision: Annotated[
        Precision, typer.Option(help="Of the copy; rounding in bf16 and fp16 hides small mistakes.")
    ] = Precision.fp32,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Train a shrunk copy of a run for some steps on many layouts, on the CPU, and compare each with one rank.

    Losses and gradient norms must agree to 1e-5 relative; exit with 1 where they do not.
    """
    from lmscale.config.io import load_run
    from lmscale.verify.comparison import Verification, plan_verification
    from lmscale.verify.show import ProgressBar, show_table, to_json

    plan = plan_verification(load_run(run, overrides or ()), layouts, max_ranks, steps, precision.value)
    verification = Verification(plan)
    with ProgressBar(len(plan.candidates) + 1) as bar:
        results = list(verification.results(bar))
    if as_json:
        typer.echo(to_json(verification, results))
    else:
        show_table(verification, results)
    return 0 if all(result.is_good for result in results) else 1


@contextlib.contextmanager
def _opened(
    checkpoint: Path, device: str | None, precision: Precision | None, **options: Any
) -> Iterator[TrainedModel]:
    """Load a model, and leave its process groups at the end."""
    if not checkpoint.is_dir():
        raise CheckpointError("does not exist", field="checkpoint", value=str(checkpoint))
    from lmscale.launcher.environment import adopt_rank
    from lmscale.log import get_logger, setup_logging

    adopt_rank()
    # stdout is for the result; DeepSpeed's logger takes hold of it while it is imported, until setup_logging.
    with contextlib.redirect_stdout(io.StringIO()), _without_compiler():
        from lmscale.evaluate.inference import load
        from lmscale.parallel.topology import close_topology

        setup_logging(int(os.environ.get("RANK", "0")))
        get_logger("lmscale").setLevel(logging.WARNING)
        model = load(checkpoint, device, precision and precision.value, **options)
    yield model
    close_topology()


@contextlib.contextmanager
def _without_compiler() -> Iterator[None]:
    """Import without torch.compile, which brings in the compiler: a quarter of the time to start.

    megatron-core puts it on functions at import, on none that inference calls.
    """
    import torch

    def leave(function: Any = None, **_: Any) -> Any:
        return leave if function is None else function

    compile, torch.compile = torch.compile, leave
    try:
        yield
    finally:
        torch.compile = compile


def _candidates(model: TrainedModel, prompt: str, options: dict[str, Any]) -> list[str]:
    """Describe the likeliest tokens of each mask, where they are asked for and not to be drawn among."""
    if "max_new_tokens" in options:
        raise ConfigError(
            f"is not read by {model.config.model.architecture}, which fills masks",
            field="--max-new-tokens",
            value=options["max_new_tokens"],
            remedy="leave it out",
        )
    if "top_k" not in options or options.get("temperature"):
        return []
    rows = enumerate(model.fill(prompt, options["top_k"]), start=1)
    return [f"mask {number}: " + ", ".join(f"{c.text!r} {c.probability:.4f}" for c in row) for number, row in rows]


def _run_tasks(
    checkpoint: Path,
    device: str | None,
    precision: Precision | None,
    base: Path | None,
    tasks: list[str],
    tasks_dir: Path | None,
    limit: float | None,
    num_fewshot: int | None,
    batch_size: int | None,
) -> list[TaskResult]:
    if not tasks:
        raise ConfigError("names no task", field="--lm-eval")
    if limit is not None and limit <= 0:
        raise ConfigError("must be above 0", field="--limit", value=limit)
    if importlib.util.find_spec("lm_eval") is None:
        rule = "needs lm-evaluation-harness, which is not installed"
        raise ConfigError(rule, field="--lm-eval", remedy="pip install lmscale[eval]")
    if tasks_dir is not None and not tasks_dir.is_dir():
        raise ConfigError("is not a directory", field="--tasks-dir", value=str(tasks_dir))
    with _opened(checkpoint, device, precision, base=base) as model:
        from lmscale.evaluate.lm_eval import run_tasks

        return run_tasks(
            model,
            tasks,
            tasks_dir=str(tasks_dir) if tasks_dir is not None else None,
            limit=limit,
            num_fewshot=num_fewshot,
            batch_size=batch_size,
        )


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _print_losses(measured: list[HeldOutLoss], as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        rows = [{**asdict(loss), "perplexity": loss.perplexity} for loss in measured]
        typer.echo(json.dumps(rows, indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    numbers = [Column(name, justify="right") for name in ("samples", "tokens", "loss, nats per token", "perplexity")]
    table = Table("corpus", *numbers)
    for loss in measured:
        figures = f"{loss.num_windows:,}", f"{loss.num_tokens:,}", f"{loss.loss:.4f}", f"{loss.perplexity:.2f}"
        table.add_row(loss.prefix, *figures)
    Console().print(table)


def _print_results(results: list[TaskResult], as_json: bool) -> None:
    if as_json:
        import json
        from dataclasses import asdict

        typer.echo(json.dumps([asdict(result) for result in results], indent=1))
        return
    from rich.console import Console
    from rich.table import Column, Table

    numbers = [Column(name, justify="right") for name in ("shots", "questions")]
    table = Table("task", *numbers, "metric", Column("value", justify="right"), Column("std. error", justify="right"))
    for result in results:
        counts = ("" if number is None else f"{number:,}" for number in (result.num_shots, result.num_samples))
        error = "" if result.stderr is None else f"{result.stderr:.4f}"
        table.add_row(result.task, *counts, result.metric, f"{result.value:.4f}", error)
    Console().print(table)
