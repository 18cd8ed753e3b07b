"""Tiny random models of transformers, and their weights (or gradients) under our names: the truth from outside.

Called in ranks only: transformers is imported there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from lmscale.evaluate.inference import LanguageModel, load
from tests.evaluate.checkpoints import Tensors, run_keys, write_checkpoint

FAMILIES = ("gpt2", "llama")
VOCAB_SIZE, MAX_POSITIONS, PADDED = 131, 64, 256
_GROUPS = {"gpt2": 4, "llama": 2}

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
    },
    "llama": {
        "num_layers": 3,
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_query_groups": 2,
        "ffn_hidden_size": 80,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": MAX_POSITIONS,
        "position_embedding": "rope",
        "normalization": "rmsnorm",
        "norm_eps": 1e-5,
        "activation": "swiglu",
        "linear_bias": False,
        "tied_head": False,
    },
}


def build_reference(family: str) -> Any:
    """Make a random model of transformers in fp32, with biases and norms that are not their neutral values."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    ours = MODELS[family]
    if family == "gpt2":
        config: Any = GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_positions=MAX_POSITIONS,
            n_embd=ours["hidden_size"],
            n_layer=ours["num_layers"],
            n_head=ours["num_attention_heads"],
            initializer_range=0.2,
            bos_token_id=None,
            eos_token_id=None,
        )
        model: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            max_position_embeddings=MAX_POSITIONS,
            hidden_size=ours["hidden_size"],
            intermediate_size=ours["ffn_hidden_size"],
            num_hidden_layers=ours["num_layers"],
            num_attention_heads=ours["num_attention_heads"],
            num_key_value_heads=ours["num_query_groups"],
            rms_norm_eps=ours["norm_eps"],
            initializer_range=0.2,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def to_logical(family: str, theirs: Tensors, padding: float) -> Tensors:
    """Rename and rearrange a model's tensors; the rows that pad the vocabulary are filled with `padding`."""
    convert = _gpt2 if family == "gpt2" else _llama
    tensors = convert(theirs, MODELS[family]["num_layers"])
    for name in ("word_embedding.table.weight", "head.table.weight"):
        if name in tensors:
            tensors[name] = F.pad(tensors[name], (0, 0, 0, PADDED - VOCAB_SIZE), value=padding)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _interleave(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int) -> torch.Tensor:
    """Stack [queries of the group; key; value], group after group."""
    parts = zip(query.chunk(groups), key.chunk(groups), value.chunk(groups), strict=True)
    return torch.cat([tensor for part in parts for tensor in part])


def _gpt2(theirs: Tensors, num_layers: int) -> Tensors:
    ours = {
        "word_embedding.table.weight": theirs["transformer.wte.weight"],
        "input_embedding.positions": theirs["transformer.wpe.weight"],
        "final_norm.norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.norm.bias": theirs["transformer.ln_f.bias"],
    }
    names = {
        "attention_norm": "ln_1",
        "attention.linear_proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    }
    for layer in range(num_layers):
        old, new = f"transformer.h.{layer}", f"layers.{layer}"
        for kind in ("weight", "bias"):
            for mine, other in names.items():
                # Conv1D keeps [in, out].
                ours[f"{new}.{mine}.{kind}"] = theirs[f"{old}.{other}.{kind}"].t().contiguous()
            query, key, value = theirs[f"{old}.attn.c_attn.{kind}"].t().chunk(3)
            ours[f"{new}.attention.linear_qkv.{kind}"] = _interleave(query, key, value, _GROUPS["gpt2"])
    return ours


def _llama(theirs: Tensors, num_layers: int) -> Tensors:
    ours = {
        "word_embedding.table.weight": theirs["model.embed_tokens.weight"],
        "head.table.weight": theirs["lm_head.weight"],
        "final_norm.norm.weight": theirs["model.norm.weight"],
    }
    for layer in range(num_layers):
        old, new = f"model.layers.{layer}", f"layers.{layer}"
        query, key, value = (theirs[f"{old}.self_attn.{name}_proj.weight"] for name in "qkv")
        ours |= {
            f"{new}.attention_norm.weight": theirs[f"{old}.input_layernorm.weight"],
            f"{new}.attention.linear_qkv.weight": _interleave(query, key, value, _GROUPS["llama"]),
            f"{new}.attention.linear_proj.weight": theirs[f"{old}.self_attn.o_proj.weight"],
            f"{new}.mlp_norm.weight": theirs[f"{old}.post_attention_layernorm.weight"],
            f"{new}.mlp.linear_fc1.weight": torch.cat(
                [theirs[f"{old}.mlp.gate_proj.weight"], theirs[f"{old}.mlp.up_proj.weight"]]
            ),
            f"{new}.mlp.linear_fc2.weight": theirs[f"{old}.mlp.down_proj.weight"],
        }
    return ours


def load_pair(directory: str, family: str, **sections: Any) -> tuple[LanguageModel, Any]:
    """Load a reference's weights, written as a checkpoint, and return (ours, the reference).

    The rows that pad the vocabulary hold large values: whatever reads them shows.
    """
    reference = build_reference(family)
    tensors = to_logical(family, dict(reference.named_parameters()), padding=7.0)
    path = write_checkpoint(Path(directory) / family, run_keys(MODELS[family], **sections), _detached(tensors))
    return load(path), reference


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}


def some_tokens(*shape: int, seed: int = 5) -> torch.Tensor:
    """Draw token ids."""
    return torch.randint(0, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(seed))


def largest_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Compute max |a - b| / max |b|."""
    assert ours.shape == truth.shape
    return float((ours - truth).abs().max() / truth.abs().max())
