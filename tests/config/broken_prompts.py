"""Overrides that break the rules of prompts and prefixes: (overrides, what the message says)."""

from __future__ import annotations

_PROMPT = ["model.init_from=x", "data.seq_length=32", "adapt.method=prompt_tuning", "adapt.length=4"]
_PREFIX = ["model.init_from=x", "data.seq_length=32", "adapt.method=prefix_tuning", "adapt.length=4"]
_TASK = ["model.preset=t5-small", "tokenizer.path=x", "objective.name=text_to_text", "objective.packed=true"]

BROKEN_PROMPTS = [
    ([*_PROMPT, "adapt.length=32"], "adapt.length = 32: leaves no room in data.seq_length = 32"),
    (
        [*_PROMPT, "data.seq_length_stages=[{seq_length: 4, until_tokens: 99}]"],
        "adapt.length = 4: leaves no room in data.seq_length_stages = 4",
    ),
    (
        [*_PROMPT, "model.preset=bert-base", "tokenizer.path=x", "adapt.length=30"],
        "adapt.length = 30: leaves 2 of data.seq_length = 32 for text, and data.seq_length must hold two segments",
    ),
    ([*_PROMPT, "data.reset_attention_mask=true"], "data.reset_attention_mask = True: prompt tuning has one prompt"),
    ([*_PROMPT, *_TASK], "objective.packed = True: prompt tuning has one prompt"),
    ([*_PREFIX, "data.seq_length=2045"], "adapt.length = 4: and the 2045 tokens of data.seq_length"),
    (
        [*_PREFIX, "model.preset=bart-base", "tokenizer.path=x", "data.decoder_seq_length=1021"],
        "adapt.length = 4: and the 1021 tokens of data.decoder_seq_length",
    ),
    ([*_PROMPT, "adapt.init=text"], "adapt.init_text = None: is required by adapt.init: text"),
    ([*_PREFIX, "adapt.init_text=a"], "adapt.init_text = 'a': is read with adapt.init: text only"),
    ([*_PREFIX, "adapt.init=text", "adapt.init_text=a"], "tokenizer: is required by adapt.init: text; add the section"),
    (
        [*_PROMPT, "adapt.init_scale=0.1"],
        "adapt.init_scale = 0.1: is read with adapt.init: uniform_sym and uniform_pos",
    ),
    (
        ["model.init_from=x", "data.seq_length=32", "adapt.method=p_tuning_v2", "train.compile=true"],
        "adapt.dropout = 0.1: train.compile: true needs 0.0",
    ),
]
