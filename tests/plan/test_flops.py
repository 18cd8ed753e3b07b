"""FLOPs against torch's own counter on a plain model, and against the field's formulas."""

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, silu
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from lmscale.config.lengths import SampleLengths
from lmscale.config.model import ModelConfig
from lmscale.config.presets import preset
from lmscale.errors import ConfigError
from lmscale.plan.flops import forward_flops_per_token, hardware_flops_per_token, model_flops_per_token
from lmscale.plan.params import parameter_table

SMALL = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=96, max_position_embeddings=24)
LLAMA = {"activation": "swiglu", "ffn_hidden_size": 88, "num_query_groups": 2, "tied_head": False, "linear_bias": False}
SEQ_LENGTH, BATCH = 24, 3


def test_a_prefix_adds_its_keys_to_every_query() -> None:
    layers, width, keys = 2, 32, 5
    plain, behind = (forward_flops_per_token(SMALL, SEQ_LENGTH, prefix_length=length) for length in (0, keys))
    assert behind["core"] - plain["core"] == 4 * layers * width * keys
    assert {**behind, "core": 0} == {**plain, "core": 0}
    fed = ModelConfig(**preset("bart-base"))
    lengths = SampleLengths(0, 30, 10, 10)
    cores = [forward_flops_per_token(fed, lengths, prefix_length=length)["core"] for length in (0, keys)]
    assert cores[1] - cores[0] == pytest.approx(4 * fed.num_layers * fed.hidden_size * keys * (30 + 2 * 10) / 40, abs=1)


class PlainLayer(nn.Module):
    """Attention and feed-forward from matmuls alone: torch's counter does not see the CPU's flash attention."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        hidden, width, kv_width = model.hidden_size, *_widths(model)
        self.query, self.out = nn.Linear(hidden, width), nn.Linear(width, hidden)
        self.key, self.value = nn.Linear(hidden, kv_width), nn.Linear(hidden, kv_width)
        self.up, self.down = nn.Linear(hidden, model.ffn_size), nn.Linear(model.ffn_size, hidden)
        self.gate = nn.Linear(hidden, model.ffn_size) if model.activation == "swiglu" else None

    def heads(self, projected, count):
        b, s, _ = projected.shape
        heads = projected.view(b, s, count, self.model.head_size).transpose(1, 2)
        return heads.repeat_interleave(self.model.num_attention_heads // count, dim=1)

    def forward(self, x):
        groups = self.model.query_groups
        query = self.heads(self.query(x), self.model.num_attention_heads)
        key, value = self.heads(self.key(x), groups), self.heads(self.value(x), groups)
        scores = (query @ key.transpose(-1, -2)).softmax(dim=-1)
        x = x + self.out((scores @ value).transpose(1, 2).flatten(2))
        inner = gelu(self.up(x)) if self.gate is None else silu(self.gate(x)) * self.up(x)
        return x + self.down(inner)


class PlainModel(nn.Module):
    def __init__(self, model, recompute):
        super().__init__()
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(PlainLayer(model) for _ in range(model.num_layers))
        self.head = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tied_head:
            self.head.weight = self.embedding.weight
        self.recompute = recompute

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute == "full" else layer(x)
        return self.head(x)


def _widths(model):
    return model.num_attention_heads * model.head_size, model.query_groups * model.head_size


def counted_per_token(model, recompute="none"):
    plain = PlainModel(model, recompute)
    tokens = torch.zeros(BATCH, SEQ_LENGTH, dtype=torch.long)
    # torch stops recomputing a layer at the last value that its backward needs; megatron-core runs all of it.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        plain(tokens).sum().backward()
    return counter.get_total_flops() / (BATCH * SEQ_LENGTH)


@pytest.mark.parametrize(
    "update",
    [{}, {"num_query_groups": 1}, {"activation": "swiglu"}, {"head_dim": 16}, {"tied_head": False}, LLAMA],
    ids=str,
)
def test_model_flops_equal_what_torch_counts(update):
    model = SMALL.model_copy(update=update)
    assert model_flops_per_token(model, SEQ_LENGTH) == counted_per_token(model)


@pytest.mark.parametrize("update", [{}, LLAMA], ids=str)
def test_full_recompute_adds_one_forward_of_the_layers(update):
    model = SMALL.model_copy(update=update)
    assert hardware_flops_per_token(model, SEQ_LENGTH, "full") == counted_per_token(model, "full")


def test_selective_recompute_adds_the_core_only_where_scores_are_kept():
    core = forward_flops_per_token(SMALL, SEQ_LENGTH)["core"]
    base = model_flops_per_token(SMALL, SEQ_LENGTH)
    assert hardware_flops_per_token(SMALL, SEQ_LENGTH) == base
    assert hardware_flops_per_token(SMALL, SEQ_LENGTH, "selective") == base
    assert hardware_flops_per_token(SMALL, SEQ_LENGTH, "selective", kernel_keeps_scores=True) == base + core


def test_causal_half_halves_the_core_and_nothing_else():
    full, half = (forward_flops_per_token(SMALL, SEQ_LENGTH, causal_half=c) for c in (False, True))
    assert half.pop("core") * 2 == full.pop("core")
    assert half == full


@pytest.mark.parametrize("name", ["gpt3-1.3b", "gpt3-175b"])
def test_gpt3_follows_megatrons_formula(name):
    model = ModelConfig(**preset(name))
    L, h, s, V = model.num_layers, model.hidden_size, 2048, model.vocab_size
    expected = 72 * L * h**2 * (1 + s / (6 * h) + V / (12 * h * L))
    assert model_flops_per_token(model, s) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("update", [{}, LLAMA], ids=str)
def test_model_flops_are_six_times_the_matrices_and_the_attention_term(update):
    model = SMALL.model_copy(update={**update, "linear_bias": False})
    table = parameter_table(model)
    matrices = table["attention"] + table["mlp"] + table["embedding"]  # the embedding stands for the head, tied or not
    attention = 12 * model.num_layers * model.num_attention_heads * model.head_size * SEQ_LENGTH
    assert model_flops_per_token(model, SEQ_LENGTH) == 6 * matrices + attention


def test_six_n_is_close_for_a_large_model():
    model = ModelConfig(**preset("gpt3-175b"))
    assert model_flops_per_token(model, 2048) == pytest.approx(6 * 174.6e9, rel=0.03)


def test_a_sequence_without_tokens_is_refused():
    with pytest.raises(ConfigError, match="seq_length = 0"):
        model_flops_per_token(SMALL, 0)
