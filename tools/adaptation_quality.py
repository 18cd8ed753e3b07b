"""Adapt small models to the synthetic tasks by every method, and write docs/adaptation_results.md with what came of it.

    python tools/adaptation_quality.py [--cases topic,table] [--jobs 2] [--page]

makes the tasks of examples/make_tasks.py, with noise in the training labels, trains tokenizers and small models on their
unlabelled text, searches a rate for each method on dev with one seed, trains with the others at the best, and writes the page
and its picture; what the page has of other cases stays. A run that has its results is not trained again, so that the same
command goes on where it was stopped; --page writes the page of what is there. tools/adaptation_runs.py has the sizes, the
rates, and the margin that is asked for.
Everything else stays under adaptation_quality/, which may be removed. The exit status is 1 where a method misses the margin
or full fine-tuning does not reach the lowest training loss.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Collection, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from adaptation_page import REFUSED, Found, Trained, write_page
from adaptation_runs import (
    BASES,
    CASES,
    HOME,
    METHODS,
    NOISE,
    NUM_HELD_OUT,
    PROMPT_LENGTH,
    SCRATCH,
    SEEDS,
    SIZES,
    TEXTS,
    UNTRAINED,
    VOCAB_SIZE,
    Case,
    base_keys,
)

from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig
from lmscale.errors import ConfigError, LmscaleError
from lmscale.launcher.method_runs import MethodRun, method_runs
from lmscale.launcher.validate import validate_run
from lmscale.parallel.local_ranks import RankFailure, RankPool

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 3600.0


def main() -> int:
    """Do what is left to do; the exit status says whether what was asked for has come."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default=",".join(CASES), help="of the tasks, joined by commas")
    parser.add_argument("--methods", default=",".join(METHODS), help="of each task, joined by commas")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--page", action="store_true", help="train nothing, write the page of what is there")
    parser.add_argument("--bases", action="store_true", help="end behind the pretraining")
    given = parser.parse_args()
    cases = given.cases.split(",")
    if not given.page:
        bases = dict.fromkeys(CASES[case].base for case in cases)
        prepare(dict.fromkeys(["text", *(BASES[name].text for name in bases)]))
        train_all([parse_run(base_keys(name)) for name in bases], given.jobs)
    if given.bases:
        return 0
    found = [adapt(case, 0 if given.page else given.jobs, given.methods.split(",")) for case in cases]
    return 0 if write_page(found) else 1


def prepare(names: Iterable[str]) -> None:
    """Make the tasks, the tokenizers and the tokens of some texts that are not there yet."""
    lmscale = [sys.executable, "-m", "lmscale"]
    for name in names:
        text = TEXTS[name]
        tasks, tokenizer = HOME / text.tasks, HOME / text.tokenizer
        file, held_out = tasks / text.file, f"--held-out {NUM_HELD_OUT}"
        make = f"examples/make_tasks.py --noise {NOISE} --train {text.lines} {held_out} --told {text.told} --output {tasks}"
        train = f"tokenizer train --vocab-size {VOCAB_SIZE} --model-type bpe --output {tokenizer} --input {file}"
        tokenize = f"tokenize --tokenizer {tokenizer} --sentences split --output {HOME / name} --input {file}"
        for made, command in (
            (tasks, [sys.executable, *make.split()]),
            (tokenizer, [*lmscale, *train.split()]),
            ((HOME / name).with_suffix(".idx"), [*lmscale, *tokenize.split()]),
        ):
            if not made.exists():
                subprocess.run(command, check=True)


def train_all(configs: Iterable[RunConfig], jobs: int) -> None:
    """Train what has not ended yet, some runs at a time, each in a process of its own: its peak memory is its own."""
    left = [config for config in configs if not _has_ended(config)]
    if not left:
        return
    import lmscale.finetune  # noqa: F401  # before the fork, so that no run imports it again

    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as workers:
        for config, line in zip(left, workers.map(_train, left), strict=True):
            print(f"{time.strftime('%H:%M:%S')} {config.output_dir}: {line}", flush=True)


def _has_ended(config: RunConfig) -> bool:
    output_dir = Path(config.output_dir)
    if config.task is not None:
        return (output_dir / "results.json").is_file()
    records = _records(output_dir)
    return bool(records) and records[-1]["consumed_tokens"] >= config.train.train_tokens


def _train(config: RunConfig) -> str:
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    failure, started = output_dir / "failure.txt", time.monotonic()
    failure.unlink(missing_ok=True)
    try:
        with RankPool(1, output_dir) as pool:
            pool.run(_train_in_rank, config, timeout_s=TIMEOUT_S)
    except RankFailure as error:
        failure.write_text(error.reason)
        return f"failed: {error.reason}"
    return f"{time.monotonic() - started:.0f} s"


def _train_in_rank(config: RunConfig) -> int:
    from lmscale.finetune import finetune
    from lmscale.pretrain import pretrain

    return pretrain(config) if config.task is None else finetune(config)


def adapt(name: str, jobs: int, only: Collection[str] = METHODS) -> Found:
    """Search a rate for each method of a case, train with the other seeds at the best; jobs: 0 trains nothing.

    Of methods that are not among `only`, those seeds count that are there.
    """
    case = CASES[name]
    run = HOME / f"{name}.yaml"
    run.write_text(yaml.safe_dump(case.keys(HOME / name), sort_keys=False))
    methods: dict[str, tuple[list[tuple[float, str]], str]] = {}
    for method in METHODS:
        specs = _specs(method, case.lengths["seq_length"])
        methods[method] = specs, _refusal(run, specs[0][1], HOME / name)
    untrained = f"{UNTRAINED}=full,optim.lr=1e-12,train.epochs=0.001"
    asked = [specs for method, (specs, refusal) in methods.items() if method in only and not refusal]
    first = [spec for specs in asked for _, spec in specs]
    if jobs:
        searched = method_runs(str(run), first, SEEDS[:1], HOME / name)
        train_all([each.config for each in method_runs(str(run), [untrained], SEEDS, HOME / name)], jobs)
        train_all([each.config for each in searched], jobs)
        train_all([each.config for each in _scratch(run, case)], jobs)
    found = Found(name, case)
    found.scratch = [_trained(each) for each in _scratch(run, case) if _results(each)]
    found.untrained = [_results(each) for each in method_runs(str(run), [untrained], SEEDS, HOME / name)]
    chosen: dict[str, tuple[float, list[MethodRun]]] = {}
    for method, (specs, refusal) in methods.items():
        if refusal:
            found.failures[method] = f"{REFUSED}{refusal}"
            continue
        rates = [(rate, *method_runs(str(run), [spec], SEEDS, HOME / name)) for rate, spec in specs]
        found.search[method] = {rate: _dev(seeds[0]) for rate, *seeds in rates}
        best = max(rates, key=lambda each: _dev(each[1]))
        chosen[method] = best[0], list(best[1:])
    if jobs:
        train_all([each.config for method in chosen if method in only for each in chosen[method][1]], jobs)
    for method, (rate, seeds) in chosen.items():
        trained = [_trained(each) for each in seeds if _results(each)]
        if trained:
            found.methods[method] = rate, trained
        if len(trained) < len(seeds):
            found.failures[method] = _failure(seeds)
    return found


def _specs(method: str, seq_length: int) -> list[tuple[float, str]]:
    rates, keys = METHODS[method]
    if method == "prompt_tuning":  # a prompt counts in
        keys = (*keys, f"data.seq_length={seq_length + PROMPT_LENGTH}")
    return [(rate, ",".join([f"{method}-{rate:g}={method}", f"optim.lr={rate:g}", *keys])) for rate in rates]


def _scratch(run: Path, case: Case) -> list[MethodRun]:
    """Make the runs that train all of a model that was never pretrained."""
    if case.scratch_rate is None:
        return []
    sizes = {**SIZES, **BASES[case.base].model}
    keys = ["adapt=null", "model.init_from=null", *(f"model.{key}={value}" for key, value in sizes.items())]
    spec = ",".join([f"{SCRATCH}=full", f"optim.lr={case.scratch_rate:g}", *keys])
    return method_runs(str(run), [spec], SEEDS, HOME / run.stem)


def _refusal(run: Path, spec: str, output: Path) -> str:
    """Return the product's line where it refuses a method, as BitFit of a model without biases."""
    try:
        for each in method_runs(str(run), [spec], SEEDS[:1], output):
            validate_run(each.config, 1)
    except ConfigError as error:
        return str(error)
    return ""


def _results(each: MethodRun) -> dict[str, Any]:
    path = Path(each.config.output_dir) / "results.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _dev(each: MethodRun) -> float:
    results = _results(each)
    return float(results["splits"]["dev"][results["metric"]]) if results else float("-inf")


def _trained(each: MethodRun) -> Trained:
    output_dir = Path(each.config.output_dir)
    losses = [line["train/lm_loss"] for line in _records(output_dir) if "train/lm_loss" in line]
    return Trained(_results(each), losses[-1] if losses else _probe_loss(each.config))


def _probe_loss(config: RunConfig) -> float:
    """Compute the loss of a probe of one layer over the training set, which its run does not write."""
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy

    from lmscale.probe import load_probe

    output_dir, task = Path(config.output_dir), config.task
    assert task is not None
    probe = load_probe(next((output_dir / "probes").glob("*.json")))
    (features,) = load_file(next((output_dir / "features").glob("train-*"))).values()
    labels = [json.loads(line)["label"] for line in Path(task.train).read_text().splitlines()]
    return float(
        cross_entropy(probe.predict(features), torch.tensor([probe.info.labels.index(each) for each in labels]))
    )


def _failure(seeds: list[MethodRun]) -> str:
    paths = [Path(each.config.output_dir) / "failure.txt" for each in seeds]
    reasons = {path.read_text() for path in paths if path.is_file()}
    done = sum(bool(_results(each)) for each in seeds)
    return f"{done} of {len(seeds)} seeds; " + ("; ".join(sorted(reasons)) or "the others were not trained yet")


def _records(output_dir: Path) -> list[dict[str, Any]]:
    path = output_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


if __name__ == "__main__":
    os.chdir(ROOT)
    try:
        sys.exit(main())
    except LmscaleError as error:
        sys.exit(f"error: {error}")
