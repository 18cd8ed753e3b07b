"""Tasks whose answer is text: labels compared by their likelihood, or text written behind a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lmscale.config.task import METRICS_OF, TaskConfig
from lmscale.data.tokenizer import Tokenizer
from lmscale.errors import ConfigError, DataError
from lmscale.tasks import metrics
from lmscale.tasks.base import Predictions, Rows, Split, Task
from lmscale.tasks.exchanges import NO_ANSWER, Exchange, Writer
from lmscale.tasks.head_rows import encoded, end_id, special_ids
from lmscale.tasks.labels import Labels
from lmscale.tasks.splits import Files
from lmscale.tasks.text_rows import Halves, Layout, TextRows, chained, pack, stacked
from lmscale.tasks.texts import Ints, Texts, joined

_NO_TEXT: list[int] = []


@dataclass(frozen=True)
class Codec:
    """How texts become what an architecture reads.

    Attributes:
        tokenizer: of the run.
        width: places of a row of gpt or the encoder.
        decoder_width: of the decoder; 0 for gpt.
        begin, end: ids before and behind an input of the encoder, and a target; gpt has an end behind a target only.
        pad: id of padding.
        start: what the decoder reads first.
        has_prefix: gpt sees all of an input at once (objective.prefix_lm).
    """

    tokenizer: Tokenizer
    width: int
    decoder_width: int
    begin: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    start: int
    has_prefix: bool = False

    @staticmethod
    def of(architecture: str, tokenizer: Tokenizer, width: int, decoder_width: int, has_prefix: bool = False) -> Codec:
        """Make that of an architecture.

        gpt: input target </s>; t5: input </s>, and target </s> behind a padding token; bart: <s> input </s>, and
        <s> target </s> behind </s>.

        Raises:
            DataError: if the tokenizer lacks a token.
        """
        if architecture == "gpt":
            end = end_id(tokenizer)
            pad = end if tokenizer.pad_id is None else tokenizer.pad_id
            return Codec(tokenizer, width, 0, (), (end,), pad, end, has_prefix)
        if architecture == "t5":
            eos, pad = special_ids(tokenizer, architecture, "eos_id", "pad_id")
            return Codec(tokenizer, width, decoder_width, (), (eos,), pad, pad)
        bos, eos, pad = special_ids(tokenizer, architecture, "bos_id", "eos_id", "pad_id")
        return Codec(tokenizer, width, decoder_width, (bos,), (eos,), pad, eos)

    @property
    def is_gpt(self) -> bool:
        """Whether input and target are one sequence."""
        return self.decoder_width == 0

    def layout(self, packed: bool = False) -> Layout:
        """Return the layout of rows."""
        return Layout(self.width, self.decoder_width, self.pad, self.start, packed, self.has_prefix)

    def framed(self, texts: Texts) -> Texts:
        """Put an input of the encoder, or a target, between its ends."""
        count = len(texts)
        return joined(Texts.constant(self.begin, count), texts, Texts.constant(self.end, count))

    def targets(self, texts: Sequence[str], places: Sequence[str]) -> Texts:
        """Encode what is to be written, its end with it. Targets are never cut.

        Raises:
            DataError: if one is too long.
        """
        made = self.framed(encoded(texts, places, self.tokenizer))
        # A row of gpt holds one token more than places: the last one is a label only. And the input needs one.
        room = self.decoder_width or self.width
        long = np.flatnonzero(made.sizes > room)
        if len(long):
            number = int(long[0])
            raise DataError(
                f"has a target of {int(made.sizes[number])} tokens, and rows have room for {max(room, 0)}",
                field=places[number],
                remedy="raise data.decoder_seq_length" if self.decoder_width else "raise data.seq_length",
            )
        return made

    def inputs(self, texts: Sequence[str], tails: Sequence[str], places: Sequence[str], rooms: Ints) -> Texts:
        """Encode what is read, without ends, each cut to its room; a text that is cut keeps its tail.

        Args:
            texts: what is read.
            tails: how each ends.
            places: file and line of each.
            rooms: int64 [texts].

        Raises:
            DataError: if there is no room.
        """
        if len(rooms) and int(rooms.min()) < 1:
            raise DataError(
                "leaves no room for the input in its row",
                field=places[int(rooms.argmin())],
                remedy="raise data.seq_length",
            )
        ids = self.tokenizer.encode_batch(list(texts))
        known: dict[str, list[int]] = {}
        for number, each in enumerate(ids):
            if not each:
                raise DataError("holds an input of which the tokenizer makes no token", field=places[number])
            room, tail = int(rooms[number]), tails[number]
            if len(each) > room:
                if tail not in known:
                    known[tail] = self.tokenizer.encode(tail) if tail else _NO_TEXT
                kept = known[tail] if len(known[tail]) < room else _NO_TEXT
                ids[number] = each[: room - len(kept)] + kept
        return Texts.of(ids)

    def input_room(self, longest_target: Ints) -> Ints:
        """Return the tokens that the input of each example may have, beside a target of so many."""
        if self.is_gpt:
            return self.width + 1 - longest_target
        return np.full(len(longest_target), self.width - len(self.begin) - len(self.end))


def build_text_task(task: TaskConfig, architecture: str, files: Files, labels: Labels | None, codec: Codec) -> Task:
    """Make the splits of a task whose answer is text.

    Raises:
        DataError: if an example is wrong or too long.
        ConfigError: if templates or label words are wrong.
    """
    writer = Writer(task, architecture, labels)
    exchanges = {name: [writer.read(each) for each in examples] for name, examples in files.examples.items()}
    if labels is not None:
        return _comparing(task, files, labels, writer, codec, exchanges)
    return _writing(task, files, writer, codec, exchanges)


def _rows(codec: Codec, halves: Halves, count: int, packed: bool) -> TextRows:
    """Put examples in rows: gpt's in one sequence, with the token that is a label only; others' in two."""
    if not packed:
        return TextRows(codec.layout(), halves, count)
    first, second = halves(np.arange(count))
    if codec.is_gpt:
        bounds = pack([first.sizes], [codec.width + 1])
    else:
        bounds = pack([first.sizes, second.sizes], [codec.width, codec.decoder_width])
    return TextRows(codec.layout(packed=True), halves, count, bounds)


def _comparing(
    task: TaskConfig, files: Files, labels: Labels, writer: Writer, codec: Codec, exchanges: dict[str, list[Exchange]]
) -> Task:
    num_labels = len(labels.names)
    words = codec.targets([writer.target(word) for word in writer.words], ["task.label_words"] * num_labels)
    _check_words(labels, words)
    longest = int(words.sizes.max())
    join = chained if codec.is_gpt else stacked

    def split(name: str, examples: list[Exchange]) -> Split:
        count = len(examples)
        inputs = codec.inputs(
            [example.segments[0][0] for example in examples],
            [example.tail for example in examples],
            [example.place for example in examples],
            codec.input_room(np.full(count, longest)),
        )
        inputs = inputs if codec.is_gpt else codec.framed(inputs)
        gold = np.array([example.label for example in examples], np.int64)
        halves = join(inputs, words, np.arange(count), gold)
        rows = _rows(codec, halves, count, task.packed and name == "train")

        def candidates() -> Rows:
            numbers = np.arange(count * num_labels)
            all_halves = join(inputs, words, numbers // num_labels, numbers % num_labels)
            return Rows(TextRows(codec.layout(), all_halves, len(numbers)), count)

        return Split(name, files.domains[name], Rows(rows, count), [[] for _ in examples], gold, candidates)

    def measure(of: Split, predictions: Predictions) -> dict[str, float]:
        scores = metrics.shaped(predictions, of.num_examples, num_labels)
        return metrics.classification(of.gold, scores.argmax(-1), num_labels)

    splits = {name: split(name, examples) for name, examples in exchanges.items()}
    return Task(None, 0, labels.names, task.metric or METRICS_OF[task.kind][0], 0, splits, measure)


def _check_words(labels: Labels, words: Texts) -> None:
    """Refuse words that are one and the same to the model."""
    seen: dict[tuple[int, ...], str] = {}
    for name, ids in zip(labels.names, words.lists(), strict=True):
        former = seen.setdefault(tuple(ids), name)
        if former != name:
            raise ConfigError(
                f"labels {former!r} and {name!r} are the same tokens",
                field="task.label_words",
                remedy="give them others",
            )


def _writing(
    task: TaskConfig, files: Files, writer: Writer, codec: Codec, exchanges: dict[str, list[Exchange]]
) -> Task:
    is_chat = task.columns.messages is not None
    learned = _targets(codec, exchanges["train"])
    most = task.max_new_tokens or int(learned.sizes.max())
    if codec.is_gpt and most > codec.width:
        raise ConfigError(
            f"leaves no room for the input in a row of {codec.width} tokens", field="task.max_new_tokens", value=most
        )

    def split(name: str, examples: list[Exchange]) -> Split:
        count = len(examples)
        targets = learned if name == "train" else _targets(codec, examples)
        if is_chat and codec.is_gpt:
            halves = _conversations(codec, examples)
        else:
            inputs = codec.inputs(*_read(examples), codec.input_room(targets.sizes))
            inputs = inputs if codec.is_gpt else codec.framed(inputs)
            numbers = np.arange(count)
            halves = (chained if codec.is_gpt else stacked)(inputs, targets, numbers, numbers)
        rows = _rows(codec, halves, count, task.packed and name == "train")

        def prompts() -> list[list[int]]:
            rooms = codec.input_room(np.full(count, most))
            if is_chat and codec.is_gpt:
                ids = [_conversation(codec, example.segments[:-1])[0] for example in examples]
                return [each[-room:] for each, room in zip(ids, np.maximum(rooms, 1).tolist(), strict=True)]
            return codec.inputs(*_read(examples), np.maximum(rooms, 1)).lists()

        references = [example.references for example in examples]
        return Split(name, files.domains[name], Rows(rows, count), references, references, None, prompts)

    mean = (
        float(np.mean([float(each.references[0]) for each in exchanges["train"]])) if task.kind == "regression" else 0.0
    )

    def measure(of: Split, predictions: Predictions) -> dict[str, float]:
        if len(predictions) != of.num_examples:
            raise ValueError(f"there are {len(predictions)} texts for {of.num_examples} examples")
        texts = [writer.unwrapped(text) for text in predictions]
        if task.kind == "regression":
            gold = np.array([float(right[0]) for right in of.references])
            return metrics.regression(gold, metrics.numbers_of(texts, mean))
        if task.kind == "extractive_qa":
            return metrics.question_answering(["" if text == NO_ANSWER else text for text in texts], of.references)
        return metrics.generation(texts, of.references)

    splits = {name: split(name, examples) for name, examples in exchanges.items()}
    return Task(None, 0, (), task.metric or METRICS_OF[task.kind][0], most, splits, measure)


def _targets(codec: Codec, examples: list[Exchange]) -> Texts:
    return codec.targets([each.segments[-1][0] for each in examples], [each.place for each in examples])


def _read(examples: list[Exchange]) -> tuple[list[str], list[str], list[str]]:
    """Return what is read of each example, its tail and its place."""
    texts = ["".join(text for text, _ in each.segments[:-1]) for each in examples]
    return texts, [each.tail for each in examples], [each.place for each in examples]


def _conversation(codec: Codec, segments: Sequence[tuple[str, bool]]) -> tuple[list[int], list[int]]:
    """Encode turns, an end behind each that is learned: ids, and 1 where they are learned."""
    ids: list[int] = []
    is_learned: list[int] = []
    for text, learned in segments:
        part = codec.tokenizer.encode(text) + (list(codec.end) if learned else [])
        ids += part
        is_learned += [int(learned)] * len(part)
    return ids, is_learned


def _conversations(codec: Codec, examples: list[Exchange]) -> Halves:
    """Encode conversations for gpt; one that is too long loses its begin. Its first token is never learned."""
    made = [_conversation(codec, example.segments) for example in examples]
    longest = codec.width + 1
    tokens = Texts.of([ids[-longest:] for ids, _ in made])
    is_learned = Texts.of([[0, *marks[-longest:][1:]] for _, marks in made])
    return lambda numbers: (tokens.take(numbers), is_learned.take(numbers))
