"""Published model sizes: the keys of `model` that a preset's name stands for.

GPT-3: Brown et al. 2020, arXiv:2005.14165, table 2.1. Two rows of the table contradict themselves and are read so that
heads x head width = width: XL has 16 heads of 128 (the table says 24, which would make 3,072, not 2,048), and 13B is
5,120 wide (the table says 5,140, which 40 heads of 128 do not make). The vocabulary is GPT-2's (50,257).
The paper alternates dense and locally banded sparse attention without giving the band; every layer is dense here.
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


PRESETS: dict[str, dict[str, Any]] = {
    "gpt3-125m": _gpt3(12, 768, 12),
    "gpt3-350m": _gpt3(24, 1024, 16),
    "gpt3-760m": _gpt3(24, 1536, 16),
    "gpt3-1.3b": _gpt3(24, 2048, 16),
    "gpt3-2.7b": _gpt3(32, 2560, 32),
    "gpt3-6.7b": _gpt3(32, 4096, 32),
    "gpt3-13b": _gpt3(40, 5120, 40),
    "gpt3-175b": _gpt3(96, 12288, 96),
}


def preset(name: str) -> dict[str, Any]:
    """Return the `model` keys of a preset.

    Raises:
        ConfigError: if there is no such preset; the message names the nearest.
    """
    if name not in PRESETS:
        raise ConfigError("is not a preset", field="model.preset", value=name, remedy=nearest(name, PRESETS))
    return dict(PRESETS[name])
