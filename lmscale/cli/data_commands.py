"""`lmscale tokenizer`, `lmscale tokenize` and `lmscale data`: parse, call, print."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmscale.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from lmscale.config.data import TokenizerConfig
    from lmscale.data.indexed import IndexedCorpus
    from lmscale.data.manifest import Manifest
    from lmscale.data.readers import Reader
    from lmscale.data.tokenizer import Tokenizer

tokenizer_app = typer.Typer(help="Tokenizers.", no_args_is_help=True)
data_app = typer.Typer(help="Tokenized corpora.", no_args_is_help=True)

_QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_SHOWN_CHARACTERS = 400


class ModelType(StrEnum):
    """Kinds of sentencepiece models."""

    unigram = "unigram"
    bpe = "bpe"
    char = "char"


class TokenizerType(StrEnum):
    """Kinds of tokenizers."""

    sentencepiece = "sentencepiece"
    hf = "hf"


class ExecutorKind(StrEnum):
    """Where the shards of a corpus are encoded."""

    local = "local"
    slurm = "slurm"
    ray = "ray"


class SentenceKind(StrEnum):
    """Ways to divide a document into sentences."""

    SPLIT = "split"
    LINES = "lines"


Inputs = Annotated[
    list[str],
    typer.Option(
        "--input", help="Glob of .txt (a document a file) or .jsonl (one a line), also .gz, .zst. Repeatable."
    ),
]
# A shell that expands a glob itself puts all but the first file behind the option.
More = Annotated[list[str] | None, typer.Argument(hidden=True)]
JsonKey = Annotated[str, typer.Option(help="Key of the text in JSON lines.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at a broken line instead of skipping and counting it.")]
TokenizerPath = Annotated[str, typer.Option(help="Tokenizer: a .model file or a directory.")]
TokenizerKind = Annotated[TokenizerType, typer.Option(help="hf needs lmscale[hf].")]


@tokenizer_app.callback()
def _tokenizer() -> None:
    """Keep `train` a subcommand: typer would make the only command of an app the app itself."""


@data_app.callback()
def _data() -> None:
    """Keep `inspect` a subcommand."""


@tokenizer_app.command("train")
def train(
    input: Inputs,
    vocab_size: Annotated[int, typer.Option(help="Ids in all, special ids and 100 sentinels included.")],
    output: Annotated[Path, typer.Option(help="Directory of the tokenizer.")],
    model_type: Annotated[ModelType, typer.Option(help="Kind of model.")] = ModelType.unigram,
    json_key: JsonKey = "text",
    strict: Strict = False,
    more: More = None,
) -> None:
    """Train a sentencepiece tokenizer on a corpus."""
    from lmscale.data.tokenizer_training import train_tokenizer

    inputs = [*input, *(more or [])]
    tokenizer = train_tokenizer(inputs, vocab_size, model_type.value, output, json_key, strict)
    typer.echo(f"{output}: {tokenizer.vocab_size:,} ids, {model_type.value}")


def tokenize(
    input: Inputs,
    tokenizer: TokenizerPath,
    output: Annotated[Path, typer.Option(help="PREFIX of PREFIX.bin, PREFIX.idx and PREFIX.json.")],
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that encode; default one for each CPU. With --executor slurm or ray: of each task; 1.",
        ),
    ] = None,
    json_key: JsonKey = "text",
    strict: Strict = False,
    tokenizer_type: TokenizerKind = TokenizerType.sentencepiece,
    sentences: Annotated[
        SentenceKind | None,
        typer.Option(
            help="Keep sentences, as bert, roberta and bart read them: split finds them, lines has one a line."
        ),
    ] = None,
    language: Annotated[
        str | None, typer.Option(help="ISO 639 code of the text, for --sentences split; left out, en.")
    ] = None,
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Keys of the input and of the target of JSON lines, as text_to_text reads them."),
    ] = None,
    task_prefix: Annotated[str, typer.Option(help="Text in front of each input, for --pair.")] = "",
    executor: Annotated[
        ExecutorKind | None,
        typer.Option(help="Encode shards of their own, by datatrove, here or on many hosts; needs lmscale[shards]."),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(min=1, help="With --executor: shards at most; default one for each worker (local) or file."),
    ] = None,
    slurm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="With --executor slurm: options of sbatch; partition and time are required."
        ),
    ] = None,
    more: More = None,
) -> None:
    """Tokenize a corpus into PREFIX.bin and PREFIX.idx, which appear together when whole.

    With --executor, into shards PREFIX-00000, ... and their list, PREFIX.shards.json, which is read like any corpus. The
    same command again makes what is missing, and nothing else.
    """
    from lmscale.config.data import TokenizerConfig
    from lmscale.data.encode import encode_corpus

    config = TokenizerConfig(type=tokenizer_type.value, path=tokenizer)
    reader = _reader(json_key, sentences, language, pair, task_prefix)
    if executor is not None:
        _tokenize_shards(
            [*input, *(more or [])], config, output, reader, strict, executor, shards, workers, slurm or []
        )
        return
    for name, value in (("--shards", shards), ("--slurm", slurm)):
        if value:
            raise ConfigError("is read with --executor only", field=name, value=value)
    result = encode_corpus([*input, *(more or [])], config, output, workers, reader, strict)
    _tell(output, result.manifest, f"in {result.seconds:.1f} s ({result.tokens_per_second:,.0f} tokens/s)")


def _tell(output: Path, manifest: Manifest, how: str) -> None:
    typer.echo(f"{output}: {manifest.documents:,} documents, {manifest.tokens:,} tokens {how}")
    for reason, count in manifest.skipped.items():
        typer.echo(f"skipped {count:,}: {reason}", err=True)


def _tokenize_shards(
    inputs: list[str],
    config: TokenizerConfig,
    output: Path,
    reader: Reader,
    strict: bool,
    executor: ExecutorKind,
    shards: int | None,
    workers: int | None,
    slurm: list[str],
) -> None:
    from lmscale.data.corpus import expand_inputs
    from lmscale.data.index_file import idx_path
    from lmscale.data.shard_executors import check_executor, run_shards
    from lmscale.data.shard_jobs import make_job

    pairs = [option.partition("=") for option in slurm]
    for name, sign, value in pairs:
        if not (name and sign and value):
            raise ConfigError("must be KEY=VALUE", field="--slurm", value=name, remedy="as in --slurm partition=cpu")
    options = {name: value for name, _, value in pairs}
    check_executor(executor.value, options)
    if idx_path(output).exists():
        remedy = "choose another --output, or remove it"
        raise DataError(
            "is a corpus in one piece, which would be read before its shards", field=str(output), remedy=remedy
        )
    is_local = executor is ExecutorKind.local
    processes = (workers or len(os.sched_getaffinity(0))) if is_local else 0
    num_shards = shards or processes or len(expand_inputs(inputs))
    job = make_job(inputs, config, output, num_shards, reader, strict, 1 if is_local else workers or 1)
    missing = job.missing()
    manifest = run_shards(job, executor.value, processes, options, missing)
    _tell(output, manifest, f"in {len(job.files)} shards, {len(job.files) - len(missing)} of which were there")


def _reader(
    json_key: str, sentences: SentenceKind | None, language: str | None, pair: tuple[str, str] | None, task_prefix: str
) -> Reader:
    from lmscale.data.readers import PairReader, TextReader
    from lmscale.data.sentences import SentenceSplitter

    if language is not None and sentences is not SentenceKind.SPLIT:
        raise ConfigError("is read with --sentences split only", field="--language", value=language)
    if pair is None:
        if task_prefix:
            raise ConfigError("is read with --pair only", field="--task-prefix", value=task_prefix)
        splitter = None if sentences is None else SentenceSplitter(sentences.value, language or "en")
        return TextReader(json_key, splitter)
    if sentences is not None:
        raise ConfigError("pairs are not divided into sentences", field="--sentences", value=sentences.value)
    if json_key != "text":
        raise ConfigError("is not read with --pair, which names its keys", field="--json-key", value=json_key)
    if pair[0] == pair[1]:
        raise ConfigError("names one key twice: input and target are two", field="--pair", value=" ".join(pair))
    return PairReader(*pair, task_prefix)


@data_app.command("inspect")
def inspect(
    prefix: Annotated[str, typer.Argument(help="PREFIX of PREFIX.bin and PREFIX.idx.")],
    documents: Annotated[int, typer.Option(min=0, help="Documents to show, from the first.")] = 3,
    tokenizer: Annotated[str | None, typer.Option(help="Decode the documents with it.")] = None,
    tokenizer_type: TokenizerKind = TokenizerType.sentencepiece,
) -> None:
    """Check a tokenized corpus and show what it holds."""
    from rich.console import Console

    from lmscale.config.data import TokenizerConfig
    from lmscale.data.indexed import IndexedCorpus
    from lmscale.data.tokenizer import load_tokenizer

    corpus = IndexedCorpus(prefix)
    loaded = None
    if tokenizer is not None:
        config = TokenizerConfig(type=tokenizer_type.value, path=tokenizer)
        loaded = load_tokenizer(config)
        corpus.check_vocabulary(loaded.vocab_size, loaded.content_hash)
    console = Console()
    console.print(_summary(corpus))
    for number in range(min(documents, corpus.num_documents)):
        console.rule(f"document {number}, {len(corpus.document(number)):,} tokens", align="left")
        console.print(_text(corpus, number, loaded), markup=False, highlight=False)


def _summary(corpus: IndexedCorpus) -> Table:
    import numpy as np
    from rich.table import Table

    table = Table(title=corpus.prefix, show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    lengths = np.quantile(np.diff(corpus.document_offsets), _QUANTILES, method="nearest")
    table.add_row("documents", f"{corpus.num_documents:,}")
    if corpus.has_sentences:
        how = corpus.manifest.sentences if corpus.manifest is not None else "of another tool"
        table.add_row("sentences", f"{corpus.num_sentences:,} ({how})")
    table.add_row("tokens", f"{corpus.num_tokens:,}")
    table.add_row("dtype", f"{corpus.tokens.dtype}, {corpus.tokens.nbytes:,} bytes")
    for share, length in zip(_QUANTILES, lengths, strict=True):
        table.add_row(f"length, quantile {share:.2f}", f"{length:,}")
    if corpus.manifest is not None:
        table.add_row("vocabulary", f"{corpus.manifest.vocab_size:,}")
        table.add_row("document end", str(corpus.manifest.eos_id))
        table.add_row("skipped", f"{sum(corpus.manifest.skipped.values()):,}")
    table.add_row("content", corpus.content_hash)
    return table


def _text(corpus: IndexedCorpus, number: int, tokenizer: Tokenizer | None) -> str:
    """Render the beginning of a document: its text, or its ids where there is no tokenizer."""
    ids = corpus.document(number)[:_SHOWN_CHARACTERS].tolist()
    text = " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " ..."
