"""What is refused before any rank starts."""

import pytest

from lmscale.config.io import show
from lmscale.errors import LmscaleError
from lmscale.launcher.validate import validate_run
from tests.launcher.runs import make_run, write_corpus, write_deepspeed


def refusal(config, devices=1) -> str:
    with pytest.raises(LmscaleError) as caught:
        validate_run(config, devices)
    assert caught.value.exit_status == 2
    return str(caught.value)


def test_a_sound_run_becomes_a_plan_with_deepspeeds_keys_in_it(tmp_path):
    path = write_deepspeed(tmp_path, {"zero_optimization": {"stage": 2}})
    plan = validate_run(make_run(tmp_path, f"deepspeed={path}", "parallel.tp_size=2"), 4)
    assert (plan.num_ranks, plan.dp_size, plan.zero.stage) == (4, 2, 2)
    assert plan.config.deepspeed == {"zero_optimization": {"stage": 2}}


def test_validation_leaves_nothing_behind(tmp_path):
    config = make_run(tmp_path)
    validate_run(config, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.bin", "corpus.idx"]


@pytest.mark.parametrize(
    ("overrides", "devices", "part"),
    [
        (["deepspeed={zero_optimization: {stag: 1}}"], 1, "did you mean 'stage'?"),
        (["deepspeed={gradient_accumulation_steps: 3}"], 1, "deepspeed.gradient_accumulation_steps = 3: contradicts"),
        ([], 3, "batch.global_batch_size = 16"),
        (["model.init_from=nowhere"], 1, "model.init_from = 'nowhere': there is no such checkpoint"),
        (["checkpoint.resume=nowhere"], 1, "checkpoint.resume = 'nowhere': there is no such checkpoint"),
        (["output_dir=/proc/version/x"], 1, "output_dir = '/proc/version/x': /proc/version is not a directory"),
        (
            ["data.seq_length=64"],
            1,
            "the train share has 64 tokens in 2 documents, fewer than one window of",
        ),
        (["data.split='1,1,0'", "data.seq_length=24"], 1, "the valid share has 24 tokens in 1 documents"),
        (["tokenizer.path=nowhere"], 1, "there is no tokenizer"),
    ],
)
def test_wrong_runs_are_refused_by_value(tmp_path, overrides, devices, part):
    assert part in refusal(make_run(tmp_path, *overrides), devices)


def test_the_smallest_corpus_is_one_window(tmp_path):
    validate_run(make_run(tmp_path, "data.seq_length=63"), 1)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_empty_and_truncated_corpora_are_refused_by_file(tmp_path, suffix):
    config = make_run(tmp_path)
    path = tmp_path / f"corpus{suffix}"
    for content in (path.read_bytes()[:-3], b""):
        path.write_bytes(content)
        assert str(path) in refusal(config)
    path.unlink()
    assert str(path) in refusal(config)


def test_a_foreign_index_is_refused(tmp_path):
    config = make_run(tmp_path)
    (tmp_path / "corpus.idx").write_bytes(b"PK\x03\x04" * 40)
    assert "corpus.idx" in refusal(config)


def test_a_held_out_corpus_is_checked_too(tmp_path):
    config = make_run(tmp_path, f"data.valid=[{{name: v, prefix: {tmp_path}/held-out}}]")
    assert "held-out" in refusal(config)
    write_corpus(tmp_path / "held-out", [8])
    assert "the corpus has 8 tokens" in refusal(config)


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    options = {"vocab_size": 60, "model_type": "char", "hard_vocab_limit": False, "minloglevel": 2}
    words = iter([f"w{number} " * 3 for number in range(200)])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=str(tmp_path / "tok"), **options)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tok.model"))
    size = processor.get_piece_size()
    config = make_run(tmp_path, f"tokenizer.path={tmp_path / 'tok.model'}")
    assert f"has {size} entries" in refusal(config)
    validate_run(make_run(tmp_path, f"tokenizer.path={tmp_path / 'tok.model'}", f"model.vocab_size={size}"), 1)


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    from lmscale.data.manifest import Manifest, manifest_path, sha256_of_file

    config = make_run(tmp_path)
    prefix = tmp_path / "corpus"
    digest = sha256_of_file(tmp_path / "corpus.idx")
    known = {"eos_id": 2, "documents": 2, "tokens": 64, "skipped": {}, "bin_bytes": 128}
    manifest = Manifest(tokenizer_hash="other", vocab_size=300, idx_sha256=digest, **known)
    manifest_path(prefix).write_text(manifest.to_json())
    assert "was tokenized with a vocabulary of 300, and model.vocab_size is 512" in refusal(config)


class TestOutputDir:
    def used(self, tmp_path, *overrides):
        former = make_run(tmp_path, *overrides)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text(show(former))

    def test_the_same_run_goes_on(self, tmp_path):
        self.used(tmp_path)
        validate_run(make_run(tmp_path), 1)

    @pytest.mark.parametrize(
        "override",
        [
            "batch.micro_batch_size=1",
            "train.train_tokens=99",
            "parallel.tp_size=2",
            "train.log_interval=3",
            "data.num_workers=0",
        ],
    )
    def test_what_does_not_change_the_training_may_change(self, tmp_path, override):
        self.used(tmp_path)
        validate_run(make_run(tmp_path, override), 2)

    @pytest.mark.parametrize(
        ("override", "key", "ours", "theirs"),
        [
            ("model.num_layers=4", "model.num_layers", "4", "2"),
            ("model.init.std=0.5", "model.init.std", "0.5", "0.02"),
            ("data.seq_length=16", "data.seq_length", "16", "32"),
            ("data.split='1,1,0'", "data.split", "'1,1,0'", "'1,0,0'"),
            ("train.seed=7", "train.seed", "7", "1234"),
            ("batch.global_batch_size=8", "batch.global_batch_size", "8", "16"),
        ],
    )
    def test_another_run_is_refused_with_both_values(self, tmp_path, override, key, ours, theirs):
        self.used(tmp_path)
        line = refusal(make_run(tmp_path, override))
        assert line.startswith(f"{key} = {ours}: the run in {tmp_path}/run has {theirs}; use another output_dir")

    def test_a_new_run_does_not_go_where_checkpoints_are(self, tmp_path):
        (tmp_path / "run" / "checkpoints" / "step-00000010").mkdir(parents=True)
        assert "holds checkpoints already" in refusal(make_run(tmp_path, "checkpoint.resume=never"))

    def test_a_new_run_may_replace_one_that_saved_nothing(self, tmp_path):
        self.used(tmp_path)
        validate_run(make_run(tmp_path, "checkpoint.resume=never", "train.seed=3"), 1)

    def test_an_unreadable_former_config_is_refused(self, tmp_path):
        self.used(tmp_path)
        (tmp_path / "run" / "config.yaml").write_text("model: 3\n")
        assert "is of a run that cannot be resumed" in refusal(make_run(tmp_path))
