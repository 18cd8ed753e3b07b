"""What is refused before any rank starts."""

import importlib.util
import json
import sys

import pytest

from lmscale.config.io import show
from lmscale.errors import LmscaleError
from lmscale.launcher.identity import identity_of
from lmscale.launcher.validate import validate_run
from lmscale.train.progress import Progress
from lmscale.train.stages import blend_of, stages_from_here
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
        (["optim.groups=[{name: x, match: layer.0.*}]"], 1, "optim.groups.0.match = 'layer.0.*': matches no parameter"),
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
    sound = (f"tokenizer.path={tmp_path / 'tok.model'}", f"model.vocab_size={size}")
    validate_run(make_run(tmp_path, *sound), 1)
    samples = (*sound, "monitor.tensorboard=true", "monitor.samples.max_new_tokens=26")
    validate_run(make_run(tmp_path, *samples, "monitor.samples.prompts=[w12]"), 1)
    refused = refusal(make_run(tmp_path, *samples, "monitor.samples.prompts=[w1234567]"))
    assert "monitor.samples.prompts = 'w1234567': must have from 1 to 6 tokens" in refused


def test_a_corpus_of_another_tokenizer_is_refused(tmp_path):
    from lmscale.data.manifest import Manifest, manifest_path, sha256_of_file

    config = make_run(tmp_path)
    prefix = tmp_path / "corpus"
    digest = sha256_of_file(tmp_path / "corpus.idx")
    known = {"eos_id": 2, "documents": 2, "tokens": 64, "skipped": {}, "bin_bytes": 128}
    manifest = Manifest(tokenizer_hash="other", vocab_size=300, idx_sha256=digest, **known)
    manifest_path(prefix).write_text(manifest.to_json())
    assert "was tokenized with a vocabulary of 300, and model.vocab_size is 512" in refusal(config)


class TestCheckpoints:
    """What a run will read is looked at before its ranks start."""

    def saved(self, tmp_path, *overrides):
        config = make_run(tmp_path, *overrides)
        directory = tmp_path / "other" / "checkpoints" / "step-00000003"
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text(show(config))
        (directory / "rank-00000.safetensors").write_bytes(b"tensors")
        (directory / "manifest.json").write_text('{"format": 1, "files": {"rank-00000.safetensors": 7}}')
        (directory.parent / "latest").write_text(directory.name)
        return directory

    @pytest.fixture(params=["model.init_from", "checkpoint.resume"])
    def key(self, request):
        return request.param

    def test_a_checkpoint_of_the_model_is_taken_by_each_of_its_names(self, tmp_path, key):
        directory = self.saved(tmp_path, "optim.lr=0.5", "batch.micro_batch_size=4")
        for path in (directory, directory.parent, directory.parent.parent):
            validate_run(make_run(tmp_path, f"{key}={path}"), 1)

    @pytest.mark.parametrize("override", ["model.hidden_size=128", "model.num_layers=4", "model.tied_head=false"])
    def test_a_checkpoint_of_another_model_is_refused(self, tmp_path, key, override):
        directory = self.saved(tmp_path, override)
        line = refusal(make_run(tmp_path, f"{key}={tmp_path / 'other'}"))
        assert line.startswith(f"{key} = '{directory}': is of another model: ")

    @pytest.mark.parametrize(
        ("override", "key", "allow"),
        [
            ("train.seed=5", "train.seed", "seed"),
            ("batch.global_batch_size=8", "batch.global_batch_size", "batch"),
            ("data.seq_length_stages=[{seq_length: 8, until_tokens: 100}]", "data.seq_length_stages", "curriculum"),
            ("data.split='1,1,0'", "data.split", None),
            ("model.hidden_dropout=0.3", "model.hidden_dropout", None),
            ("objective={name: causal_lm, prefix_lm: true}", "objective.prefix_lm", None),
        ],
    )
    def test_another_run_is_not_gone_on_from_its_path_but_lends_its_weights(self, tmp_path, override, key, allow):
        directory = self.saved(tmp_path, override)
        ours, theirs = (dict(identity_of(make_run(tmp_path, *more)))[key] for more in ([], [override]))
        line = refusal(make_run(tmp_path, f"checkpoint.resume={directory}"))
        assert line.startswith(
            f"{key} = {ours!r}: the checkpoint {directory} has {theirs!r}; use the former value, or "
        )
        assert ("checkpoint.allow_change" in line) == (allow is not None)
        if allow:
            assert f"checkpoint.allow_change = ['{allow}']" in line
            validate_run(make_run(tmp_path, f"checkpoint.resume={directory}", f"checkpoint.allow_change=[{allow}]"), 1)
        validate_run(make_run(tmp_path, f"model.init_from={directory}"), 1)

    def test_corpora_are_compared_by_content(self, tmp_path):
        config = make_run(tmp_path)
        directory = self.saved(tmp_path)
        (stage,) = stages_from_here(config, Progress(), [])
        manifest = {"format": 1, "files": {"rank-00000.safetensors": 7}, "stages": [stage]}
        (directory / "manifest.json").write_text(json.dumps(manifest))
        resumed = f"checkpoint.resume={directory}"
        validate_run(make_run(tmp_path, resumed), 1)
        stage["train"][0]["content_hash"] = "0123456789abcdef"  # as if the corpus had been made anew since
        (directory / "manifest.json").write_text(json.dumps(manifest))
        for other in (resumed, f"output_dir={tmp_path / 'other'}"):
            line = refusal(make_run(tmp_path, other))
            assert line.startswith(f"data.train = ['{tmp_path}/corpus']: the checkpoint {directory} has read ")
            assert "content 0123456789ab, weight 1, and there is" in line
            assert line.endswith("or checkpoint.allow_change = ['data'] to go on otherwise from here")
            validate_run(make_run(tmp_path, other, "checkpoint.allow_change=[data]"), 1)

    def test_a_tokenizer_is_compared_with_the_checkpoints_copy(self, tmp_path):
        sentencepiece = pytest.importorskip("sentencepiece")
        options = {"vocab_size": 60, "model_type": "char", "hard_vocab_limit": False, "minloglevel": 2}
        sizes = {}
        for name in "ab":
            words = iter([f"w{number} " * 3 for number in range(200 if name == "a" else 190)])
            prefix = str(tmp_path / name)
            sentencepiece.SentencePieceTrainer.train(sentence_iterator=words, model_prefix=prefix, **options)
            sizes[name] = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model").get_piece_size()
        assert sizes["a"] == sizes["b"]
        mine, other = ((f"tokenizer.path={tmp_path}/{name}.model", f"model.vocab_size={sizes['a']}") for name in "ab")
        directory = self.saved(tmp_path, *mine)
        (directory / "tokenizer").mkdir()
        (directory / "tokenizer" / "a.model").write_bytes((tmp_path / "a.model").read_bytes())
        resumed = f"checkpoint.resume={directory}"
        validate_run(make_run(tmp_path, resumed, *mine), 1)
        (directory / "tokenizer" / "a.model").rename(directory / "tokenizer" / "b.model")
        line = refusal(make_run(tmp_path, resumed, *other))
        assert line.startswith(f"tokenizer.path = '{tmp_path}/b.model': has SHA-256 ")
        assert f"and the tokenizer of the checkpoint {directory} " in line

    def test_a_torn_checkpoint_is_refused(self, tmp_path, key):
        directory = self.saved(tmp_path)
        (directory / "rank-00000.safetensors").write_bytes(b"tens")
        assert "rank-00000.safetensors has 4 bytes of 7" in refusal(make_run(tmp_path, f"{key}={directory}"))
        (directory / "manifest.json").unlink()
        assert "holds no checkpoint" in refusal(make_run(tmp_path, f"{key}={directory}"))

    def test_the_newest_checkpoint_of_the_run_itself_is_looked_at(self, tmp_path):
        directory = self.saved(tmp_path)
        there = f"output_dir={tmp_path / 'other'}"
        validate_run(make_run(tmp_path, there), 1)
        line = refusal(make_run(tmp_path, there, "model.num_layers=4"))
        assert line.startswith(f"checkpoint.resume = '{directory}': is of another model: layers.2.")

    def test_the_run_itself_falls_back_to_a_whole_one_and_others_are_not_taken_for_what_they_are_not(self, tmp_path):
        directory = self.saved(tmp_path)
        (directory.parent / "latest").write_text("step-00000009")
        validate_run(make_run(tmp_path, f"output_dir={tmp_path / 'other'}"), 1)
        named = refusal(make_run(tmp_path, f"checkpoint.resume={tmp_path / 'other'}"))
        assert "'step-00000009': names a checkpoint that does not exist" in named
        (directory / "rank-00000.safetensors").write_bytes(b"tens")
        assert "has 4 bytes of 7" in refusal(make_run(tmp_path, f"output_dir={tmp_path / 'other'}"))

    def test_a_config_of_another_version_is_left_to_the_ranks(self, tmp_path, key):
        directory = self.saved(tmp_path)
        (directory / "config.yaml").write_text("model: {unknown: 3}")
        validate_run(make_run(tmp_path, f"{key}={directory}"), 1)


def test_wandb_is_asked_for_before_the_ranks_start(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    assert "needs the wandb package; pip install lmscale[wandb]" in refusal(make_run(tmp_path, "monitor.wandb=true"))


def test_prometheus_is_asked_for_before_the_ranks_start(tmp_path, monkeypatch):
    find_spec, package = importlib.util.find_spec, "prometheus_client"
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    refused = refusal(make_run(tmp_path, "monitor.prometheus_port=9464"))
    assert "monitor.prometheus_port = 9464: needs the prometheus-client package; pip install lmscale[prom" in refused


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

    @pytest.mark.parametrize(
        ("name", "override", "key"),
        [
            ("batch", "batch.global_batch_size=8", "batch.global_batch_size"),
            ("batch", "batch.ramp={start: 4, increment: 4, ramp_samples: 20}", "batch.ramp"),
            ("batch", "batch.stages=[{batch_size: 8, until_tokens: 100}]", "batch.stages"),
            ("curriculum", "data.seq_length_stages=[{seq_length: 8, until_tokens: 100}]", "data.seq_length_stages"),
            ("seed", "train.seed=8", "train.seed"),
        ],
    )
    def test_a_change_that_is_allowed_goes_on_and_no_other(self, tmp_path, name, override, key):
        self.used(tmp_path)
        line = refusal(make_run(tmp_path, override))
        assert line.startswith(f"{key} = ")
        assert line.endswith(f"or checkpoint.allow_change = ['{name}'] to go on otherwise from here")
        validate_run(make_run(tmp_path, override, f"checkpoint.allow_change=[{name}]"), 1)
        assert refusal(
            make_run(tmp_path, override, "data.seq_length=16", f"checkpoint.allow_change=[{name}]")
        ).startswith("data.seq_length = 16")

    def test_another_blend_is_refused_with_both_and_goes_on_where_it_is_allowed(self, tmp_path):
        self.used(tmp_path)
        write_corpus(tmp_path / "other", [70])
        blend = f"data.train=[{{prefix: {tmp_path}/corpus, weight: 3}}, {{prefix: {tmp_path}/other}}]"
        line = refusal(make_run(tmp_path, blend))
        assert line.startswith("data.train = [{'prefix': ")
        assert f"the run in {tmp_path}/run has [{{'prefix': '{tmp_path}/corpus', 'weight': 1.0}}]" in line
        assert line.endswith("or checkpoint.allow_change = ['data'] to go on otherwise from here")
        validate_run(make_run(tmp_path, blend, "checkpoint.allow_change=[data]"), 1)
        assert refusal(make_run(tmp_path, blend, "train.seed=7", "checkpoint.allow_change=[data]")).startswith(
            "train.seed = 7"
        )

    def test_a_corpus_that_has_moved_is_the_same_and_one_that_was_made_anew_is_not(self, tmp_path):
        self.used(tmp_path)
        content = blend_of(make_run(tmp_path))[0]["content_hash"]
        (tmp_path / "run" / "manifest.json").write_text(json.dumps({"data": {f"{tmp_path}/corpus": content}}))
        moved = f"data.train=[{{prefix: {tmp_path}/moved}}]"
        for end in ("bin", "idx"):
            (tmp_path / f"moved.{end}").write_bytes((tmp_path / f"corpus.{end}").read_bytes())
        validate_run(make_run(tmp_path, moved), 1)
        write_corpus(tmp_path / "moved", [70])
        assert refusal(make_run(tmp_path, moved)).startswith("data.train = ")

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


def test_a_cooldown_that_begins_at_its_end_is_refused(tmp_path):
    cooled = ("optim.lr_decay_tokens=4000", "optim.lr_cooldown={start_tokens: 4000, tokens: 6000}")
    assert refusal(make_run(tmp_path, *cooled)).startswith("optim.lr_cooldown.start_tokens = 4000: the schedule's rate")
