"""Parameter counts against published sizes and against models built of torch's own layers."""

import pytest
from torch import nn

from lmscale.config.model import ModelConfig
from lmscale.config.presets import PRESETS, preset, with_defaults
from lmscale.plan.params import num_parameters, parameter_table

SMALL = ModelConfig(num_layers=3, hidden_size=48, num_attention_heads=6, vocab_size=131, max_position_embeddings=20)
LLAMA = {
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "activation": "swiglu",
    "linear_bias": False,
    "tied_head": False,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
}


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt3-125m", 125.2),
        ("gpt3-350m", 355.9),
        ("gpt3-760m", 760.3),
        ("gpt3-1.3b", 1316),
        ("gpt3-2.7b", 2652),
        ("gpt3-6.7b", 6658),
        ("gpt3-13b", 12850),
        ("gpt3-175b", 174604.3),
    ],
)
def test_gpt3_presets_have_their_published_size(name, millions):
    assert num_parameters(ModelConfig(**preset(name))) / 1e6 == pytest.approx(millions, rel=4e-4)


def test_gpt3_175b_is_exact():
    assert num_parameters(ModelConfig(**preset("gpt3-175b"))) == 174_604_259_328


PUBLISHED = {
    "bert-base": 110_106_428,
    "bert-large": 336_226_108,
    "roberta-base": 124_697_433,
    "roberta-large": 355_412_057,
    "bart-base": 139_420_416,
    "bart-large": 406_291_456,
    "t5-small": 60_506_624,
    "t5-base": 222_903_552,
    "t5-large": 737_668_096,
    "t5-3b": 2_851_598_336,
    "t5-11b": 11_307_321_344,
    "t5-v1.1-small": 60_511_616,
    "t5-v1.1-base": 222_903_552,
    "t5-v1.1-large": 750_251_008,
    "t5-v1.1-xl": 2_783_959_040,
    "t5-v1.1-xxl": 11_003_736_064,
}
"""T5 v1.1 as transformers counts it, without the output matrix that it ties and the model does not."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_presets_have_their_published_size_exactly(name):
    model = ModelConfig.model_validate(with_defaults({"preset": name}))
    untied = 0 if model.tied_head else 32128 * model.hidden_size
    assert num_parameters(model) == PUBLISHED[name] + untied


def test_all_presets_are_covered():
    assert len(PRESETS) == 8 + len(PUBLISHED)


def test_llama_7b_and_llama2_70b_are_exact():
    llama = dict(LLAMA, vocab_size=32000)
    seven = dict(llama, num_layers=32, hidden_size=4096, num_attention_heads=32, num_query_groups=32)
    seventy = dict(llama, num_layers=80, hidden_size=8192, num_attention_heads=64, num_query_groups=8)
    assert num_parameters(ModelConfig(**{**seven, "ffn_hidden_size": 11008})) == 6_738_415_616
    assert num_parameters(ModelConfig(**{**seventy, "ffn_hidden_size": 28672})) == 68_976_648_192


@pytest.mark.parametrize(
    "update",
    [
        {},
        {"tied_head": False},
        {"linear_bias": False},
        {"num_query_groups": 3},
        {"head_dim": 16},
        {"position_embedding": "rope"},
        {"normalization": "rmsnorm"},
        {"activation": "swiglu", "ffn_hidden_size": 100},
        LLAMA,
    ],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
def test_table_equals_the_parameters_of_torch_layers(update, padded):
    model = SMALL.model_copy(update=update)
    table = parameter_table(model, padded)
    assert table == {kind: _count(modules) for kind, modules in _torch_layers(model, padded).items()}
    assert num_parameters(model, padded) == sum(table.values())


def test_padding_adds_rows_to_embedding_and_untied_head_only():
    model = SMALL.model_copy(update={"tied_head": False})
    rows = model.padded_vocab_size - model.vocab_size
    assert rows == 256 - 131
    assert num_parameters(model, padded=True) - num_parameters(model) == 2 * rows * model.hidden_size


def _torch_layers(model, padded):
    h, f, bias = model.hidden_size, model.ffn_size, model.linear_bias
    width, kv_width = model.num_attention_heads * model.head_size, model.query_groups * model.head_size
    norm = nn.LayerNorm if model.normalization == "layernorm" else nn.RMSNorm
    vocab = model.padded_vocab_size if padded else model.vocab_size
    layers = range(model.num_layers)
    inputs = 2 if model.activation == "swiglu" else 1
    return {
        "embedding": [nn.Embedding(vocab, h)],
        "positions": [nn.Embedding(model.max_position_embeddings, h)] if model.position_embedding == "learned" else [],
        "attention": [
            nn.Linear(*size, bias=bias)
            for _ in layers
            for size in [(h, width), (h, kv_width), (h, kv_width), (width, h)]
        ],
        "mlp": [nn.Linear(*size, bias=bias) for _ in layers for size in [(h, f)] * inputs + [(f, h)]],
        "norms": [norm(h) for _ in range(2 * model.num_layers + 1)],
        "head": [] if model.tied_head else [nn.Linear(h, vocab, bias=False)],
    }


def _count(modules):
    return sum(p.numel() for module in modules for p in module.parameters())
