"""Trained models behind the interface of lm-evaluation-harness, and its tasks run on them.

What the harness asks is computed as its own model of transformers does (lm_eval/models/huggingface.py of 0.4.13):
contexts are cut from the left, requests go in batches from the longest to the shortest. Two things differ. A text
without a context follows the end of a document, as in training, where the harness takes bos if there is one. And the
special tokens of bart and t5 (lmscale.evaluate.encoder_decoder) stand around what is left of a cut context.

Imported only where lm-eval is installed: `run_tasks` is for those who call it, `lmscale evaluate --lm-eval` says so.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lmscale.errors import ConfigError
from lmscale.evaluate.encoder_decoder import EncoderDecoderModel
from lmscale.evaluate.inference import LanguageModel
from lmscale.evaluate.model import Score, TrainedModel
from lmscale.evaluate.sampling import Sampling

NUM_ENDS = 2
"""Special tokens around a context of bart; t5 has one."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation), the ids of the context, the ids of the continuation."""


@dataclass(frozen=True)
class TaskResult:
    """One number of a task.

    Attributes:
        task: its name, or its group's.
        num_shots: examples before each question.
        num_samples: questions.
        metric: name, and the filter of answers behind a comma where it is not "none".
        value: the number.
        stderr: its standard error; None where the harness gives none.
    """

    task: str
    num_shots: int | None
    num_samples: int | None
    metric: str
    value: float
    stderr: float | None


def run_tasks(
    model: TrainedModel,
    tasks: Sequence[str],
    *,
    tasks_dir: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int | None = None,
) -> list[TaskResult]:
    """Run tasks of the harness on a model.

    Args:
        model: gpt, bart or t5.
        tasks: names of tasks, groups or tags.
        tasks_dir: a directory with more of them, in YAML.
        limit: questions of each task, or a share of them where it is below 1.
        num_fewshot: examples before each question; left out, as each task says.
        batch_size: requests computed at a time; left out, the run's micro_batch_size.

    Returns:
        The results; under tensor parallelism on the first rank of each host only, elsewhere none.

    Raises:
        ConfigError: if the model is an encoder, or there is no such task.
    Collectives: over the model's ranks; all must call.
    """
    harness = HarnessModel(model, batch_size or model.config.batch.micro_batch_size)
    with contextlib.redirect_stdout(sys.stderr):  # the harness prints what it does; stdout is the caller's
        manager = _task_manager(tasks, tasks_dir)
        found = simple_evaluate(
            harness,
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            task_manager=manager,
            log_samples=False,
        )
    return [] if found is None else _results(found)


def _task_manager(tasks: Sequence[str], tasks_dir: str | None) -> TaskManager:
    """Index tasks: those of a directory, and the harness's own, which takes seconds, where one of them is meant."""
    if tasks_dir is not None:
        manager = TaskManager(include_path=tasks_dir, include_defaults=False)
        if all(manager.match_tasks([name]) for name in tasks):
            return manager
    manager = TaskManager(include_path=tasks_dir)
    for name in tasks:
        if not manager.match_tasks([name]):
            rule = "is not a task of lm-evaluation-harness" + (f", nor one in {tasks_dir}" if tasks_dir else "")
            remedy = "name a task, or its directory: --tasks-dir" if tasks_dir is None else None
            raise ConfigError(rule, field="--lm-eval", value=name, remedy=remedy)
    return manager


def _results(found: dict[str, Any]) -> list[TaskResult]:
    rows = []
    for task, values in found["results"].items():
        shots, samples = found.get("n-shot", {}).get(task), found.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in values.items():
            metric, comma, answers = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{answers}")
            name = metric if answers == "none" else key
            stderr = float(error) if isinstance(error, int | float) else None
            rows.append(TaskResult(task, shots, samples, name, float(value), stderr))
    return rows


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A trained model as the harness calls it.

    gpt: all three requests. bart, t5: the context goes to the encoder, the continuation to the decoder, and there is no
    rolling likelihood. bert, roberta: none, since they give a text no likelihood and write none.

    Raises:
        ConfigError: if the model is an encoder.
    """

    def __init__(self, model: TrainedModel, batch_size: int):
        super().__init__()
        kind = model.config.model.architecture
        if not isinstance(model, LanguageModel | EncoderDecoderModel):
            rule = "gives a text no likelihood and writes none, which the tasks ask for"
            raise ConfigError(rule, field="model.architecture", value=kind, remedy="use a gpt, bart or t5")
        self._model, self._batch_size = model, batch_size
        self.backend = "causal" if isinstance(model, LanguageModel) else "seq2seq"

    @property
    def max_length(self) -> int:
        """Most tokens that the model, or its encoder, reads; for t5, which has no limit, as many as in training."""
        config = self._model.config
        is_relative = config.model.position_embedding == "relative"
        return config.lengths.encoder if is_relative else config.model.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        """The end of a document, behind which a text without a context stands."""
        return self._model.special_id("eos")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode, without special tokens: the model adds its own."""
        return self._model.encode(string)[0]

    # -- likelihoods -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        for (_, text), _, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                rule = f"has {len(continuation)} tokens, and there must be 1 to {self.max_length}"
                raise ConfigError(rule, field="continuation", value=text[:40])
        order = Collator(requests, sort_fn=lambda request: (-len(request[1] + request[2]), request[1] + request[2]))
        answers = []
        for batch in order.get_batched(n=self._batch_size):
            for score, (_, _, continuation) in zip(self._scores(batch), batch, strict=True):
                values = score.log_likelihoods[-len(continuation) :]
                answers.append((sum(values), all(score.are_likeliest[-len(continuation) :])))
        return order.get_original(answers)  # type: ignore[no-any-return]

    def _scores(self, batch: Sequence[Request]) -> list[Score]:
        if isinstance(self._model, LanguageModel):
            # The last token is predicted only, so one more than the positions fits.
            whole = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in batch]
            return self._model.score_ids(whole, len(whole))
        sources = [self._cut(context if text else []) for (text, _), context, _ in batch]
        return self._model.score(sources, [continuation for _, _, continuation in batch], len(sources))

    def _cut(self, context: list[int], num_new: int = 0) -> list[int]:
        """Cut a context from the left, so that it fits."""
        room = self.max_length - num_new - (NUM_ENDS if self.backend == "seq2seq" else 0)
        return context[-room:] if room > 0 else []

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Compute the log-likelihood of whole texts, in windows that follow one another where they are too long."""
        if self.backend == "seq2seq":
            kind = self._model.config.model.architecture
            rule = "gives a text without a context no likelihood, which a task of rolling likelihoods asks for"
            raise ConfigError(rule, field="model.architecture", value=kind, remedy="use another task")
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.tok_encode(text)
            rolling = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(("", text), *make_disjoint_window(window)) for window in rolling]
            windows += parts
            counts.append(len(parts))
        answers = iter(self._loglikelihood_tokens(windows))
        return [sum(next(answers)[0] for _ in range(count)) for count in counts]

    # -- writing -----------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Write what follows contexts, up to one of the strings that each request stops at."""
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: (-len(self.tok_encode(arguments[0])), arguments[0]),
            group_by="gen_kwargs",
            group_fn=lambda arguments: arguments[1],
        )
        texts: list[str] = []
        for batch in order.get_batched(n=self._batch_size):
            texts += self._generate([context for context, _ in batch], normalize_gen_kwargs(batch[0][1]))
        return order.get_original(texts)  # type: ignore[no-any-return]

    def _generate(self, contexts: Sequence[str], options: Any) -> list[str]:
        num_new, until = options["max_gen_toks"], [stop for stop in options["until"] if stop]
        reads = num_new if self.backend == "causal" else 0
        if reads >= self.max_length:
            raise ConfigError(
                f"leaves no room for the context: the model reads {self.max_length} tokens",
                field="max_gen_toks",
                value=num_new,
                remedy="set it in the task's generation_kwargs",
            )
        decode = self._model.decode
        ids = [self._cut(self.tok_encode(context), reads) for context in contexts]
        if self.backend == "causal":
            ids = [row or [self.prefix_token_id] for row in ids]
        temperature = options["temperature"] if options["do_sample"] else 0.0
        # The harness seeds torch's generator: equal runs, equal text.
        seed = int(torch.randint(2**31, (1,)))
        new = self._model.generate_ids(
            ids,
            num_new,
            Sampling(temperature, options.get("top_k"), options.get("top_p"), seed),
            self.eot_token_id,
            lambda row: any(stop in decode(row) for stop in until),
        )
        return [postprocess_generated_text(decode(row), until, None) for row in new]
