"""`lmscale verify` on ranks: right layouts pass, a broken one is caught, a rank's death is a line in the table."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from lmscale.cli.main import main
from lmscale.config.data import TokenizerConfig
from lmscale.config.io import parse_run
from lmscale.config.run import RunConfig
from lmscale.data.encode import encode_corpus
from lmscale.data.readers import TextReader
from lmscale.data.sentences import SentenceSplitter
from lmscale.data.tokenizer_training import train_tokenizer
from lmscale.verify.comparison import Result, Verification, largest_difference, plan_verification
from lmscale.verify.corpus import shrink_corpora
from tests.launcher.runs import run_keys, write_corpus, write_run

LLAMA = {
    "num_layers": 2,
    "num_query_groups": 2,
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "linear_bias": False,
    "tied_head": False,
    "hidden_dropout": 0.1,
}


@pytest.fixture(autouse=True)
def workspaces_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a layout fails, its logs stay."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


class Silent:
    """An observer that does nothing."""

    def begins(self, layout: Any) -> None: ...

    def tick(self) -> None: ...

    def ends(self, result: Any) -> None: ...


def config_of(directory: Path, **model: Any) -> RunConfig:
    keys = run_keys(directory)
    keys["model"] |= model
    return parse_run(keys)


def verify(config: RunConfig, layouts: str, **options: Any) -> tuple[Verification, list[Result]]:
    options = {"max_ranks": 2, "steps": 3, **options}
    verification = Verification(plan_verification(config, layouts, **options))
    return verification, list(verification.results(Silent()))


@pytest.fixture
def broken_in_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], None]:
    """Replace something here: ranks are forked from this process, and take it along."""
    return lambda target, value: monkeypatch.setattr(target, value)


@pytest.mark.distributed
def test_layouts_of_a_llama_with_isolated_documents_are_the_same(tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", [7, 30, 2, 90, 11] * 10)
    keys = run_keys(tmp_path)
    keys["model"] |= LLAMA
    keys["data"]["reset_attention_mask"] = True
    keys["parallel"] = {"recompute": "selective"}
    keys["batch"]["ramp"] = {"start": 4, "increment": 4, "ramp_samples": 64}
    verification, results = verify(parse_run(keys), "tp2-sp,pp2-zero1,dp2-zero3,pp1,zero0", steps=4)
    assert verification.data == "the run's corpora, shortened"
    assert [result.verdict for result in results] == ["reference", *["same"] * 5]
    assert [result.layout.num_ranks for result in results] == [1, 2, 2, 2, 1, 1]
    assert max(result.loss_difference for result in results) < 1.0e-6
    assert verification.directory is None


@pytest.mark.distributed
def test_norm_gradients_that_are_not_summed_under_sequence_parallelism_are_caught(
    tmp_path: Path, broken_in_ranks: Callable[[str, Any], None]
) -> None:
    broken_in_ranks("lmscale.models.build._sum_over_tensor_parallel", lambda model, context: None)
    _, results = verify(config_of(tmp_path), "tp2,tp2-sp")
    assert [result.verdict for result in results] == ["reference", "same", "differs"]
    assert results[-1].grad_norm_difference > 1.0e-3


@pytest.mark.distributed
def test_a_rank_that_raises_is_a_line_and_leaves_its_traceback(
    tmp_path: Path, broken_in_ranks: Callable[[str, Any], None]
) -> None:
    broken_in_ranks("lmscale.models.build._sum_over_tensor_parallel", _raise)
    verification, results = verify(config_of(tmp_path), "tp2-sp,pp1")
    assert [result.verdict for result in results] == ["reference", "failed", "same"]
    assert results[1].reason.endswith(": ValueError: a defect of a rank")
    assert verification.directory is not None
    logs = "".join(path.read_text() for path in verification.directory.glob("tp2-sp-zero0/logs/rank-*.log"))
    assert "Traceback" in logs
    assert "a defect of a rank" in logs


def _raise(*_: Any) -> None:
    raise ValueError("a defect of a rank\nin two lines")


@pytest.mark.distributed
def test_the_command_prints_json_and_returns_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path)
    argv = ["verify", str(path), "data.train.0.prefix=nowhere", "--layouts", "tp2", "--steps", "2", "--json"]
    assert main(argv) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["data"] == "random tokens, since nowhere is not there"
    assert [(row["layout"], row["verdict"]) for row in shown["layouts"]] == [
        ("zero0", "reference"),
        ("tp2-zero0", "same"),
    ]
    assert all(row["loss_difference"] <= shown["tolerance"] == 1.0e-5 for row in shown["layouts"])
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_the_command_prints_a_table_and_returns_1_where_a_layout_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], broken_in_ranks: Callable[[str, Any], None]
) -> None:
    broken_in_ranks("lmscale.models.build._sum_over_tensor_parallel", lambda model, context: None)
    assert main(["verify", str(write_run(tmp_path)), "--layouts", "tp2-sp", "--steps", "2"]) == 1
    shown = capsys.readouterr().out
    assert "tp2-sp-zero0" in shown
    assert "differs" in shown
    assert "1 of 1 layouts fail, to 1e-05 relative" in shown


@pytest.mark.parametrize(
    ("extra", "part"),
    [
        (["--layouts", "pp2-zero3"], "pipeline with ZeRO 2 or 3 cannot be trained"),
        (["--layouts", "tp2", "--max-ranks", "1"], "--max-ranks is 1"),
        (["--layouts", "tp3", "--max-ranks", "3"], "--layouts = 'tp3-zero0': the run, shrunk"),
        (["--steps", "0"], "--steps = 0: must be at least 1"),
        (["--precision", "fp8"], "--precision"),
        (["model.hidden_size=65"], "model.hidden_size = 65"),
        (["model.num_layer=3"], "did you mean 'num_layers'?"),
    ],
)
def test_wrong_input_is_refused_before_a_rank_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], part: str
) -> None:
    assert main(["verify", str(write_run(tmp_path)), *extra]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert part in error


def test_documents_are_shortened_as_windows_are_and_keep_their_ends(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "corpus.bin"), dtype=np.int32)
    documents = [np.arange(1, 101) + 1000, np.arange(1, 21) + 1000] * 20
    for document in documents:
        builder.add_document(document, [len(document)])
    builder.finalize(str(tmp_path / "corpus.idx"))
    keys = run_keys(tmp_path)
    keys["model"] |= {"vocab_size": 2000, "max_position_embeddings": 320}
    keys["data"]["seq_length"] = 320
    config = parse_run(keys)
    small = plan_verification(config, "dp2").small
    made, _ = shrink_corpora(config, small, tmp_path)
    assert small.data.seq_length == 32
    written = IndexedDataset(made.data.train[0].prefix)
    vocab_size = small.model.vocab_size
    assert [len(written[number]) for number in (0, 1, 2)] == [10, 2, 10]
    assert written[0].tolist() == [token % vocab_size for token in (*range(1001, 1010), 1100)]


def test_a_damaged_corpus_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path)
    (tmp_path / "corpus.idx").write_bytes(b"nonsense")
    assert main(["verify", str(path), "--layouts", "dp2"]) == 2
    assert "corpus.idx" in capsys.readouterr().err


def test_random_tokens_stand_in_for_each_source(tmp_path: Path) -> None:
    keys = yaml.safe_load(write_run(tmp_path).read_text())
    keys["data"]["train"].append({"prefix": "nowhere", "weight": 3.0})
    config = parse_run(keys)
    made, description = shrink_corpora(config, plan_verification(config, "dp2").small, tmp_path / "small")
    assert description == "random tokens, since nowhere is not there"
    assert [source.weight for source in made.data.train] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("values", "reference", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.2], [1.0, 2.0], 0.1),
        ([float("nan")], [float("nan")], 0.0),
        ([float("nan"), 1.0], [1.0, 1.0], float("inf")),
        ([1.0], [0.0], 1.0),
    ],
)
def test_difference_is_the_largest_over_the_steps(
    values: list[float], reference: list[float], difference: float
) -> None:
    assert largest_difference(values, reference) == pytest.approx(difference)


@pytest.mark.distributed
@pytest.mark.parametrize("architecture", [pytest.param("bert", marks=pytest.mark.slow), "t5"])
def test_layouts_of_other_objectives_are_the_same_on_the_runs_own_corpus(architecture: str, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    sentences = [
        f"The fox number {n} jumps over {n % 7} dogs. It sleeps! Does it dream? Yes, of {n}." for n in range(80)
    ]
    text.write_text("".join(json.dumps({"text": " ".join(sentences[n : n + 6])}) + "\n" for n in range(70)))
    train_tokenizer([str(text)], 420, "bpe", tmp_path / "tokenizer")
    tokenizer = TokenizerConfig(path=str(tmp_path / "tokenizer"))
    encode_corpus(
        [str(text)], tokenizer, tmp_path / "corpus", workers=1, reader=TextReader(splitter=SentenceSplitter("split"))
    )
    keys = run_keys(tmp_path)
    keys["model"] = {
        **{"architecture": architecture, "num_layers": 4, "hidden_size": 64, "num_attention_heads": 4},
        **{"vocab_size": 420, "max_position_embeddings": 64},
    }
    keys["tokenizer"] = {"path": tokenizer.path}
    keys["data"]["seq_length"] = 64
    if architecture == "t5":
        keys["data"]["decoder_seq_length"] = 16
    verification, results = verify(parse_run(keys), "tp2-sp,pp2-zero1,dp2-zero3", steps=3)
    assert verification.data == "the run's corpora"
    assert [result.verdict for result in results] == ["reference", *["same"] * 3]
