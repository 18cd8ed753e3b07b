"""Every launch/runs/adapt-*.yaml: it loads, fits its devices and its task's files, and says what its paper says."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lmscale.config.adapt import AdaptConfig, ProbingConfig, prompt_length
from lmscale.config.check import check_run, dp_size_of
from lmscale.config.deepspeed_json import check_deepspeed, load_deepspeed
from lmscale.config.io import load_run
from lmscale.config.model import ModelConfig
from lmscale.config.presets import with_defaults
from lmscale.config.run import RunConfig
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.registry import family_to_import
from lmscale.plan.adaptation import Adaptation, adaptation_of, attentions
from lmscale.plan.groups import check_groups, num_trainable
from lmscale.plan.memory import zero_bytes
from lmscale.tasks.check import check_task
from lmscale.tasks.resolve import resolve_task
from tests.test_recipes import ROOT, header, num_devices

Keys = dict[str, Any]


class Recipe(NamedTuple):
    """What a paper, or its code, says."""

    task: str
    base: str
    rows: int
    """Training examples of the published data; 0 where the run is counted in steps."""
    steps: int
    batch: int
    lengths: tuple[int, int]
    optimizer: tuple[str, float, float]
    """Name, rate, weight decay."""
    warmup_steps: int
    style: str
    clip: float
    adapt: Keys
    trained: int
    """Numbers of the method, without a head."""


def lora(rank: int, alpha: float, dropout: float) -> Keys:
    return {"method": "lora", "rank": rank, "alpha": alpha, "dropout": dropout, "targets": ["query", "value"]}


def prefix(length: int, projection: int) -> Keys:
    return {"method": "prefix_tuning", "length": length, "projection": projection, "dropout": 0.0, "init": "random"}


def network(length: int, projection: int, hidden: int, layers: int) -> int:
    """Numbers of one kind of attention while its network trains."""
    return length * hidden + projection * hidden + projection + 2 * layers * hidden * (projection + 1)


ADAFACTOR = ("adafactor", 0.3, 1e-5)
RECIPES = {
    "adapt-lora-gpt2-e2e": Recipe(
        "e2e",
        "gpt2-medium",
        42_061,
        26_289,
        8,
        (512, 0),
        ("adamw", 2e-4, 0.01),
        500,
        "linear",
        0.0,
        lora(4, 32, 0.1),
        393_216,
    ),
    "adapt-lora-roberta-base-mnli": Recipe(
        "mnli",
        "roberta-base",
        392_702,
        92_040,
        128,
        (512, 0),
        ("adamw", 5e-4, 0.1),
        5_522,
        "linear",
        1.0,
        lora(8, 16, 0.0),
        294_912,
    ),
    "adapt-prefix-gpt2-e2e": Recipe(
        "e2e",
        "gpt2-medium",
        42_061,
        84_122,
        5,
        (512, 0),
        ("adamw", 5e-5, 0.0),
        0,
        "linear",
        1.0,
        prefix(10, 512),
        network(10, 512, 1024, 24),
    ),
    "adapt-prefix-bart-xsum": Recipe(
        "xsum",
        "bart-large",
        204_045,
        127_529,
        48,
        (512, 60),
        ("adamw", 5e-5, 0.0),
        0,
        "linear",
        1.0,
        prefix(200, 800),
        3 * network(200, 800, 1024, 12),
    ),
    "adapt-prompt-t5-boolq": Recipe(
        "boolq",
        "t5-xxl-lm-adapt",
        0,
        30_000,
        32,
        (612, 8),
        ADAFACTOR,
        0,
        "constant",
        0.0,
        {"method": "prompt_tuning", "length": 100, "init": "labels"},
        409_600,
    ),
    "adapt-prompt-t5-squad-ood": Recipe(
        "squad",
        "t5-xxl-lm-adapt",
        0,
        30_000,
        32,
        (612, 64),
        ADAFACTOR,
        0,
        "constant",
        0.0,
        {"method": "prompt_tuning", "length": 100, "init": "vocabulary"},
        409_600,
    ),
    "adapt-ptuning-roberta-large-rte": Recipe(
        "rte",
        "roberta-large",
        2_490,
        7_782,
        32,
        (128, 0),
        ("adamw", 5e-3, 0.0),
        0,
        "linear",
        1.0,
        {"method": "p_tuning_v2", "length": 128, "dropout": 0.1, "projection": None},
        2 * 24 * 1024 * 128,
    ),
    "adapt-ptuning-bert-large-boolq": Recipe(
        "boolq",
        "bert-large-cased",
        9_427,
        29_460,
        32,
        (128, 0),
        ("adamw", 5e-3, 0.0),
        0,
        "linear",
        1.0,
        {"method": "p_tuning_v2", "length": 40, "dropout": 0.1, "projection": None},
        2 * 24 * 1024 * 40,
    ),
    "adapt-houlsby-bert-large-mrpc": Recipe(
        "mrpc",
        "bert-large-uncased",
        3_668,
        2_293,
        32,
        (128, 0),
        ("adamw", 3e-4, 0.01),
        229,
        "linear",
        1.0,
        {"method": "adapter", "variant": "houlsby", "width": 64, "init_std": 1e-3},
        6_343_680 + 100_352,
    ),
    "adapt-pfeiffer-roberta-large-mnli": Recipe(
        "mnli",
        "roberta-large",
        392_702,
        7_670,
        256,
        (128, 0),
        ("adamw", 3e-4, 0.0),
        767,
        "linear",
        1.0,
        {"method": "adapter", "variant": "pfeiffer", "width": 16},
        811_392,
    ),
    "adapt-bitfit-bert-large-rte": Recipe(
        "rte",
        "bert-large-cased",
        2_490,
        4_980,
        8,
        (128, 0),
        ("adamw", 1e-3, 0.0),
        0,
        "constant",
        1.0,
        {"method": "bitfit", "which": "all"},
        272_384,
    ),
    "adapt-full-bert-large-mnli": Recipe(
        "mnli",
        "bert-large-uncased",
        392_702,
        36_816,
        32,
        (128, 0),
        ("adamw", 2e-5, 0.01),
        3_682,
        "linear",
        1.0,
        {"method": "full", "top_layers": None},
        335_141_888,
    ),
    "adapt-full-t5-base-cnndm": Recipe(
        "cnndm",
        "t5-base",
        0,
        2**18,
        128,
        (512, 512),
        ("adafactor", 1e-3, 0.0),
        0,
        "constant",
        0.0,
        {"method": "full"},
        222_903_552,
    ),
    "adapt-probing-bert-large-pos": Recipe(
        "pos",
        "bert-large-cased",
        12_543,
        3_920,
        32,
        (128, 0),
        ("adamw", 1e-3, 0.0),
        0,
        "constant",
        1.0,
        {"method": "probing", "head": "linear", "layers": "all", "control": True},
        0,
    ),
}
NAMES = sorted(RECIPES)

EXAMPLES: dict[str, list[Keys]] = {
    "e2e": [{"context": "name : Alimentum | area : city centre", "completion": "Alimentum is in the centre."}],
    "xsum": [{"document": "It rained for a week.", "summary": "A wet week."}],
    "boolq": [{"question": "is it", "passage": "It is.", "label": truth} for truth in (True, False)],
    "squad": [{"question": "Where?", "context": "It is in Rome.", "answers": {"text": ["Rome"], "answer_start": [9]}}],
    "mnli": [
        {"premise": "A man.", "hypothesis": "A person.", "label": label}
        for label in ("entailment", "neutral", "contradiction")
    ],
    "rte": [
        {"premise": "A man.", "hypothesis": "A person.", "label": label} for label in ("entailment", "not_entailment")
    ],
    "mrpc": [{"sentence1": "It is.", "sentence2": "It was.", "label": label} for label in (0, 1)],
    "cnndm": [{"article": "It rained for a week.", "highlights": "A wet week."}],
    "pos": [{"tokens": ["In", "Rome"], "tags": ["ADP", "PROPN"]}],
}
"""Of each task, lines as the headers describe them."""

_BERT = {"model_type": "bert", "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "type_vocab_size": 2}
_ROBERTA = {"model_type": "roberta", "layer_norm_eps": 1e-5, "max_position_embeddings": 514, "type_vocab_size": 1}
_BASE = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
BASES: dict[str, tuple[Keys, set[str]]] = {
    "gpt2-medium": (
        {
            "model_type": "gpt2",
            "n_embd": 1024,
            "n_layer": 24,
            "n_head": 16,
            "n_positions": 1024,
            "vocab_size": 50257,
            "activation_function": "gelu_new",
        },
        set(),
    ),
    "bert-large-uncased": (
        {**_BERT, **_LARGE, "hidden_act": "gelu", "vocab_size": 30522},
        {"cls.seq_relationship.weight"},
    ),
    "bert-large-cased": (
        {**_BERT, **_LARGE, "hidden_act": "gelu", "vocab_size": 28996},
        {"cls.seq_relationship.weight"},
    ),
    "roberta-base": ({**_ROBERTA, **_BASE, "hidden_act": "gelu", "vocab_size": 50265}, set()),
    "roberta-large": ({**_ROBERTA, **_LARGE, "hidden_act": "gelu", "vocab_size": 50265}, set()),
    "bart-large": (
        {
            "model_type": "bart",
            "d_model": 1024,
            "encoder_layers": 12,
            "decoder_layers": 12,
            "encoder_attention_heads": 16,
            "decoder_attention_heads": 16,
            "encoder_ffn_dim": 4096,
            "decoder_ffn_dim": 4096,
            "max_position_embeddings": 1024,
            "vocab_size": 50265,
            "activation_function": "gelu",
        },
        set(),
    ),
    "t5-base": (
        {
            "model_type": "t5",
            "d_model": 768,
            "d_ff": 3072,
            "d_kv": 64,
            "num_heads": 12,
            "num_layers": 12,
            "vocab_size": 32128,
            "feed_forward_proj": "relu",
        },
        set(),
    ),
    "t5-xxl-lm-adapt": (
        {
            "model_type": "t5",
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_heads": 64,
            "num_layers": 24,
            "vocab_size": 32128,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
        },
        {"lm_head.weight"},
    ),
}
"""The published config.json of each base, as far as the arithmetic goes, and tensors beside it that decide something."""
NOT_OF_THE_WEIGHTS = {
    "preset",
    "init",
    "init_from",
    "hidden_dropout",
    "attention_dropout",
    "ffn_dropout",
    "max_position_embeddings",
}


class Names:
    """Weights of which the names alone are looked at."""

    def __init__(self, names: set[str]):
        self.names = names

    def read(self, name: str) -> Any:
        raise AssertionError(name)


def path_of(name: str) -> Path:
    return ROOT / "launch" / "runs" / f"{name}.yaml"


def steps_of(config: RunConfig, rows: int) -> int:
    """Count the steps of a run over the published data, as tasks.resolve does."""
    assert config.task is not None
    if config.train.epochs is None:
        tokens = config.batch.global_batch_size * config.lengths.nominal
        assert config.train.train_tokens % tokens == 0
        return config.train.train_tokens // tokens
    return math.ceil(config.train.epochs * rows / config.batch.global_batch_size)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the tasks' files in small, from which recipes are run."""
    for name in RECIPES:
        task = load_run(path_of(name)).task
        assert task is not None
        for path in (task.train, task.dev, *(test.path for test in task.test)):
            assert path is not None
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            lines = EXAMPLES[RECIPES[name].task]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolved(name: str) -> RunConfig:
    """Load a recipe and say how long it is on the published data, which is not here."""
    config = load_run(path_of(name))
    steps = steps_of(config, RECIPES[name].rows)
    tokens = steps * config.batch.global_batch_size * config.lengths.nominal
    train = config.train.model_copy(update={"train_tokens": tokens, "epochs": None})
    return resolve_task(config.model_copy(update={"train": train}), prompt_length(config.adapt))


def added(adapt: AdaptConfig | None, adaptation: Adaptation) -> int:
    """Count what is trained, the head apart."""
    if isinstance(adapt, ProbingConfig):
        return 0
    sizes = {name: math.prod(shape) for name, shape in adaptation.shapes(padded=False).items()}
    of_base = ("task_head.pooler",) if adaptation.model.next_sentence_head else ()  # BERT has one
    counted = (name for name in sizes if not name.startswith("task_head") or name.startswith(of_base))
    return sum(adaptation.num_trained(name, sizes[name]) for name in counted)


def test_each_recipe_is_here_and_nothing_else() -> None:
    assert sorted(path.stem for path in (ROOT / "launch" / "runs").glob("adapt-*.yaml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_legal_on_its_devices_and_reads_its_files(name: str, home: Path) -> None:
    config, path = resolved(name), path_of(name)
    zero = check_deepspeed(load_deepspeed(config.deepspeed), config)
    check_run(config, zero, num_devices(path))
    check_groups(config.model, config.optim, adaptation_of(config))
    check_task(config, prompt_length(config.adapt))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_the_numbers_of_its_paper(name: str, home: Path) -> None:
    config, recipe = resolved(name), RECIPES[name]
    optim, tokens = config.optim, recipe.batch * config.lengths.nominal
    assert (config.data.seq_length, config.data.decoder_seq_length or 0) == recipe.lengths
    assert config.batch.global_batch_size == recipe.batch
    assert config.train.train_tokens == recipe.steps * tokens
    assert (optim.name, optim.lr, optim.weight_decay) == recipe.optimizer
    assert optim.lr_warmup_tokens == pytest.approx(recipe.warmup_steps * tokens, abs=tokens / 2)
    assert (optim.lr_decay_style, optim.max_grad_norm, optim.min_lr) == (recipe.style, recipe.clip, 0.0)
    if optim.name == "adamw":
        assert (optim.adam_beta1, optim.adam_beta2) == (0.9, 0.999)
    elif recipe.adapt["method"] == "prompt_tuning":
        assert (optim.adafactor_decay_exponent, optim.adafactor_scale_parameter) == (0.8, False)
    else:
        assert optim.adafactor_scale_parameter
    assert config.adapt is not None
    assert config.adapt.model_dump(include=set(recipe.adapt)) == recipe.adapt


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_as_many_numbers_as_its_paper(name: str, home: Path) -> None:
    config = resolved(name)
    adaptation = adaptation_of(config)
    assert adaptation is not None
    assert added(config.adapt, adaptation) == RECIPES[name].trained


@pytest.mark.parametrize(
    ("name", "count"), [("adapt-prefix-gpt2-e2e", 491_520), ("adapt-prefix-bart-xsum", 14_745_600)]
)
def test_prefix_recipe_keeps_as_many_numbers_as_its_paper(name: str, count: int) -> None:
    model, length = load_run(path_of(name)).model, RECIPES[name].adapt["length"]
    assert len(attentions(model)) * 2 * length * model.query_groups * model.head_size == count


@pytest.mark.parametrize("name", NAMES)
def test_recipes_base_is_what_import_hf_makes_of_the_published_one(name: str) -> None:
    config, base = load_run(path_of(name)), RECIPES[name].base
    keys, names = BASES[base]
    hf = HfConfig(keys)
    imported = ModelConfig.model_validate(with_defaults(family_to_import(hf).to_model(hf, Names(names))))
    left_out = NOT_OF_THE_WEIGHTS - (set() if config.model.architecture == "t5" else {"max_position_embeddings"})
    ours, theirs = (model.model_dump(exclude=left_out) for model in (config.model, imported))
    assert ours | {"ffn_hidden_size": config.model.ffn_size, "head_dim": 0, "num_query_groups": 0} == theirs | {
        "ffn_hidden_size": imported.ffn_size,
        "head_dim": 0,
        "num_query_groups": 0,
    }
    assert config.model.head_size == imported.head_size
    assert config.model.init_from == f"bases/{base}"
    assert config.tokenizer is not None
    assert config.tokenizer.path == f"hf/{base}"


@pytest.mark.parametrize("name", NAMES)
def test_recipe_states_its_source_its_commands_and_what_was_published(name: str) -> None:
    text = header(path_of(name))
    assert f"lmscale import-hf hf/{RECIPES[name].base} bases/{RECIPES[name].base}" in text
    assert f"--module lmscale.finetune --config launch/runs/{name}.yaml" in text
    assert re.search(r"arXiv:\d{4}\.\d{5}", text)
    assert "# Published: " in text
    if RECIPES[name].rows:
        assert f"{RECIPES[name].rows:,} to train" in text.replace("\n# ", " ")


@pytest.mark.parametrize("name", NAMES)
def test_bytes_of_state_in_the_header_follow_the_formula(name: str, home: Path) -> None:
    """Frozen weights in the precision of the arithmetic; gradients, master weights and moments of what is trained."""
    found = re.search(r"a device holds ([\d.]+) GB of weights", header(path_of(name)))
    assert found
    assert float(found[1]) == pytest.approx(state_bytes(name) / 1e9, rel=0.01, abs=0.06)


def state_bytes(name: str) -> float:
    config, devices = resolved(name), num_devices(path_of(name))
    split = config.parallel.tp_size * config.parallel.pp_size
    if isinstance(config.adapt, ProbingConfig):
        trained, total = 0, num_trainable(config.model, config.optim)[1]
    else:
        trained, total = num_trainable(config.model, config.optim, adaptation_of(config))
    return zero_bytes(
        total // split,
        dp_size_of(config, devices),
        check_deepspeed(load_deepspeed(config.deepspeed), config).stage,
        config.precision,
        moment_width=0 if config.optim.name == "adafactor" else 8,
        num_trainable=trained // split,
    ).total
