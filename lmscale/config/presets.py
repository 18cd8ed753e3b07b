"""Published model sizes, the keys of `model` that a preset's name stands for, and what each architecture defaults to.

GPT-3: Brown et al. 2020, arXiv:2005.14165, table 2.1. Two rows of the table contradict themselves and are read so that
heads x head width = width: XL has 16 heads of 128 (the table says 24, which would make 3,072, not 2,048), and 13B is
5,120 wide (the table says 5,140, which 40 heads of 128 do not make). The vocabulary is GPT-2's (50,257).
The paper alternates dense and locally banded sparse attention without giving the band; every layer is dense here.

BERT: Devlin et al. 2019, arXiv:1810.04805, sec. 3, and the settings of its published code and checkpoints (uncased
vocabulary). The paper's 340M is 336,226,108 with both heads.

RoBERTa: Liu et al. 2019, arXiv:1907.11692, table 9. Its model has no segments; the published checkpoints hold one row of
token types, which is kept so that they convert without loss.

BART: Lewis et al. 2020, arXiv:1910.13461, sec. 2.1, and its published code.

T5: Raffel et al. 2020, arXiv:1910.10683, sec. 3.7 (v1.0), and the v1.1 models of its repository: gated GELU, no tying,
no dropout in pretraining. The vocabulary is that of the published tables, 32,100 entries and 28 rows without a token.
"""

from __future__ import annotations

from typing import Any

from lmscale.config.validation import nearest
from lmscale.errors import ConfigError


def _gpt3(num_layers: int, hidden_size: int, num_attention_heads: int) -> dict[str, Any]:
    return {
        "architecture": "gpt",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "vocab_size": 50257,
        "max_position_embeddings": 2048,
    }


def _bert(num_layers: int, hidden_size: int, num_attention_heads: int, architecture: str = "bert") -> dict[str, Any]:
    return {
        "architecture": architecture,
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "vocab_size": 30522 if architecture == "bert" else 50265,
        "max_position_embeddings": 1024 if architecture == "bart" else 512,
    }


def _t5(
    num_layers: int, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int, head_dim: int, v1_1: bool = False
) -> dict[str, Any]:
    sizes = {
        "architecture": "t5",
        "num_layers": num_layers,
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "head_dim": head_dim,
        "vocab_size": 32128,
    }
    return sizes | _T5_V1_1 if v1_1 else sizes


_POST_NORM: dict[str, Any] = {
    "norm_position": "post",
    "embedding_norm": True,
    "activation": "gelu",
    "hidden_dropout": 0.1,
    "attention_dropout": 0.1,
}
_T5_V1_1: dict[str, Any] = {
    "activation": "geglu",
    "tied_head": False,
    "scaled_logits": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "ffn_dropout": 0.0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt": {},
    "bert": {
        **_POST_NORM,
        "token_types": 2,
        "norm_eps": 1.0e-12,
        "next_sentence_head": True,
        "init": {"scheme": "truncated_normal", "residual": "none"},
    },
    "roberta": {
        **_POST_NORM,
        "token_types": 1,
        "position_offset": 2,
        "init": {"residual": "none"},
    },
    "bart": {**_POST_NORM, "position_offset": 2, "init": {"residual": "none"}},
    "t5": {
        "position_embedding": "relative",
        "normalization": "rmsnorm",
        "norm_eps": 1.0e-6,
        "activation": "relu",
        "linear_bias": False,
        "scaled_scores": False,
        "scaled_logits": True,
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "ffn_dropout": 0.1,
        "init": {"scheme": "t5", "residual": "none"},
    },
}
"""What `model.architecture` sets, under preset and given keys."""

PRESETS: dict[str, dict[str, Any]] = {
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
    "bert-base": _bert(12, 768, 12),
    "bert-large": _bert(24, 1024, 16),
    "roberta-base": _bert(12, 768, 12, "roberta"),
    "roberta-large": _bert(24, 1024, 16, "roberta"),
    "bart-base": _bert(6, 768, 12, "bart"),
    "bart-large": _bert(12, 1024, 16, "bart"),
    "t5-small": _t5(6, 512, 2048, 8, 64),
    "t5-base": _t5(12, 768, 3072, 12, 64),
    "t5-large": _t5(24, 1024, 4096, 16, 64),
    "t5-3b": _t5(24, 1024, 16384, 32, 128),
    "t5-11b": _t5(24, 1024, 65536, 128, 128),
    "t5-v1.1-small": _t5(8, 512, 1024, 6, 64, v1_1=True),
    "t5-v1.1-base": _t5(12, 768, 2048, 12, 64, v1_1=True),
    "t5-v1.1-large": _t5(24, 1024, 2816, 16, 64, v1_1=True),
    "t5-v1.1-xl": _t5(24, 2048, 5120, 32, 64, v1_1=True),
    "t5-v1.1-xxl": _t5(24, 4096, 10240, 64, 64, v1_1=True),
}


def preset(name: str) -> dict[str, Any]:
    """Return the `model` keys of a preset.

    Raises:
        ConfigError: if there is no such preset; the message names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError("is not a preset", field="model.preset", value=name, remedy=nearest(name, PRESETS))
    return dict(PRESETS[name])


def with_defaults(model: dict[str, Any]) -> dict[str, Any]:
    """Lay the preset, and under it the defaults of the architecture, under the `model` keys that were given.

    Raises:
        ConfigError: if there is no such preset.
    """
    name = model.get("preset")
    sized = {**preset(name), **model} if isinstance(name, str) else dict(model)
    defaults = ARCHITECTURES.get(str(sized.get("architecture", "gpt")), {})
    given = sized.get("init")
    merged = {**defaults, **sized}
    if "init" in defaults and (given is None or isinstance(given, dict)):
        merged["init"] = {**defaults["init"], **(given or {})}
    return merged
