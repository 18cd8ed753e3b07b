"""Every tensor means what its name says: a plain transformer over our names computes what transformers computes.

A round trip alone would not notice two norms that changed places.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lmscale.config.io import load_run
from lmscale.config.model import ModelConfig
from lmscale.convert.importing import import_hf
from lmscale.train.checkpoint_reader import PARAMETER, CheckpointReader
from tests.convert.models import VOCAB_SIZE, build, save

TOLERANCE = 1.0e-5
"""max |a - b| / max |b| in fp32: the same sums in another order."""
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu}
Forward = torch.Tensor


class Plain:
    """A slow transformer over logical tensors: no masks but the causal one, no dropout."""

    def __init__(self, checkpoint: Path):
        reader = CheckpointReader(checkpoint)
        self.tensors = {name: reader.logical(PARAMETER, name).clone() for name in reader.shapes()}
        self.model: ModelConfig = load_run(checkpoint / "config.yaml").model

    def linear(self, name: str, x: Forward) -> Forward:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, name: str, x: Forward) -> Forward:
        weight, eps = self.tensors[f"{name}.weight"], self.model.norm_eps
        if self.model.normalization == "rmsnorm":
            return F.rms_norm(x, weight.shape, weight, eps)
        return F.layer_norm(x, weight.shape, weight, self.tensors[f"{name}.bias"], eps)

    def sub_layer(self, norm: str, x: Forward, function: Any) -> Forward:
        if self.model.norm_position == "pre":
            return x + function(self.norm(norm, x))
        return self.norm(norm, x + function(x))

    def heads(self, fused: Forward, parts: int) -> tuple[Forward, ...]:
        return fused.unflatten(-1, (self.model.num_attention_heads, parts, self.model.head_size)).unbind(-2)

    def attend(self, q: Forward, k: Forward, v: Forward, bias: Forward | float = 0.0) -> Forward:
        scale = self.model.head_size**-0.5 if self.model.scaled_scores else 1.0
        scores = torch.einsum("bqnd,bknd->bnqk", q, k) * scale + bias
        return torch.einsum("bnqk,bknd->bqnd", scores.softmax(-1), v).flatten(-2)

    def self_attention(self, name: str, x: Forward, bias: Forward | float) -> Forward:
        return self.linear(
            f"{name}.linear_proj", self.attend(*self.heads(self.linear(f"{name}.linear_qkv", x), 3), bias)
        )

    def cross_attention(self, name: str, x: Forward, memory: Forward) -> Forward:
        (query,) = self.heads(self.linear(f"{name}.linear_q", x), 1)
        return self.linear(
            f"{name}.linear_proj", self.attend(query, *self.heads(self.linear(f"{name}.linear_kv", memory), 2))
        )

    def feed_forward(self, name: str, x: Forward) -> Forward:
        inner = self.linear(f"{name}.linear_fc1", x)
        if self.model.activation == "geglu":
            gate, up = inner.chunk(2, -1)
            return self.linear(f"{name}.linear_fc2", ACTIVATIONS["gelu_tanh"](gate) * up)
        return self.linear(f"{name}.linear_fc2", ACTIVATIONS[self.model.activation](inner))

    def layers(self, name: str, x: Forward, bias: Forward | float = 0.0, memory: Forward | None = None) -> Forward:
        for index in range(self.model.num_layers):
            layer = f"{name}.{index}"
            x = self.sub_layer(
                f"{layer}.attention_norm", x, lambda y, n=layer: self.self_attention(f"{n}.attention", y, bias)
            )
            if memory is not None:
                x = self.sub_layer(
                    f"{layer}.cross_attention_norm",
                    x,
                    lambda y, n=layer: self.cross_attention(f"{n}.cross_attention", y, memory),
                )
            x = self.sub_layer(f"{layer}.mlp_norm", x, lambda y, n=layer: self.feed_forward(f"{n}.mlp", y))
        return x

    def embed(self, name: str, tokens: Forward, types: Forward | None = None) -> Forward:
        x = self.tensors["word_embedding.table.weight"][tokens]
        if f"{name}.positions" in self.tensors:
            start = self.model.position_offset
            x = x + self.tensors[f"{name}.positions"][start : start + tokens.size(1)]
        if types is not None:
            x = x + self.tensors[f"{name}.token_types"][types]
        return self.norm(f"{name}.norm", x) if self.model.embedding_norm else x

    def relative_bias(self, stack: str, length: int) -> Forward | float:
        from transformers.models.t5.modeling_t5 import T5Attention

        if self.model.position_embedding != "relative":
            return 0.0
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        buckets = T5Attention._relative_position_bucket(
            distance, stack == "encoder", self.model.relative_buckets, self.model.relative_max_distance
        )
        return self.tensors[f"{stack}_relative_bias.table"][:, buckets]

    def masked_logits(self, tokens: Forward, types: Forward) -> tuple[Forward, Forward | None]:
        x = self.layers("layers", self.embed("input_embedding", tokens, types))
        dense = ACTIVATIONS[self.model.activation](self.linear("masked_head.dense", x))
        logits = self.norm("masked_head.norm", dense) @ self.tensors["word_embedding.table.weight"].T
        logits = (logits + self.tensors["output_bias.bias"])[..., :VOCAB_SIZE]
        if not self.model.next_sentence_head:
            return logits, None
        return logits, self.linear("masked_head.next_sentence", self.linear("masked_head.pooler", x[:, 0]).tanh())

    def seq2seq_logits(self, tokens: Forward, decoder_tokens: Forward) -> Forward:
        bias = self.relative_bias("encoder", tokens.size(1))
        memory = self.layers("encoder_layers", self.embed("encoder_embedding", tokens), bias)
        is_pre = self.model.norm_position == "pre"
        memory = self.norm("encoder_norm.norm", memory) if is_pre else memory
        length = decoder_tokens.size(1)
        bias = self.relative_bias("decoder", length) + torch.full((length, length), -torch.inf).triu(1)
        x = self.layers("decoder_layers", self.embed("decoder_embedding", decoder_tokens), bias, memory)
        x = self.norm("final_norm.norm", x) if is_pre else x
        x = x * self.model.hidden_size**-0.5 if self.model.scaled_logits else x
        table = "word_embedding.table.weight" if self.model.tied_head else "head.table.weight"
        return (x @ self.tensors[table].T)[..., :VOCAB_SIZE]


def largest_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def some_tokens(length: int, seed: int) -> torch.Tensor:
    # From 3 on: RoBERTa gives positions to all but the padding.
    return torch.randint(3, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", ["bert", "bert masked", "roberta"])
def test_tensors_of_an_encoder(tmp_path, case):
    theirs = build(case)
    import_hf(save(theirs, tmp_path / "source"), tmp_path / "checkpoint")
    ours, tokens = Plain(tmp_path / "checkpoint"), some_tokens(17, 1)
    types = (torch.arange(17) > 8).long().expand(2, 17) % ours.model.token_types
    with torch.no_grad():
        expected = theirs(tokens, token_type_ids=types)
    logits, next_sentence = ours.masked_logits(tokens, types)
    assert largest_error(logits, expected.get("logits", expected.get("prediction_logits"))) <= TOLERANCE
    assert (next_sentence is not None) == (case == "bert")
    if next_sentence is not None:
        assert largest_error(next_sentence, expected.seq_relationship_logits) <= TOLERANCE


@pytest.mark.parametrize("case", ["bart", "t5", "t5 v1.1", "t5 v1.1 tied"])
def test_tensors_of_an_encoder_and_decoder(tmp_path, case):
    theirs = build(case)
    import_hf(save(theirs, tmp_path / "source"), tmp_path / "checkpoint")
    ours, tokens, decoder_tokens = Plain(tmp_path / "checkpoint"), some_tokens(30, 1), some_tokens(25, 2)
    with torch.no_grad():
        expected = theirs(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
    assert largest_error(ours.seq2seq_logits(tokens, decoder_tokens), expected) <= TOLERANCE
