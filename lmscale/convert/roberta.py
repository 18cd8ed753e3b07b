"""RoBERTa: BERT's layers; positions begin behind the padding's row, at pad_token_id + 1."""

from __future__ import annotations

from typing import Any

from lmscale.config.model import ModelConfig
from lmscale.convert.bert import encoder_layers, encoder_to_hf, encoder_to_model
from lmscale.convert.family import Family, Ids, Weights
from lmscale.convert.hf_config import HfConfig
from lmscale.convert.mapping import Entry, PadRows, entry, linear, padded_vocabulary
from lmscale.errors import ConversionError

_PAD_ID = 1


def table(model: ModelConfig, hf: HfConfig) -> list[Entry]:
    """List the tensors.

    transformers takes the first position from the padding's id. Where a tokenizer of ours has another one than the
    model's table was made for, the unused rows in front of the first position are dropped, or filled up with zeros.
    """
    unused = model.position_offset - _first_position(hf)
    return [
        entry("word_embedding.table.weight", "roberta.embeddings.word_embeddings.weight", padded_vocabulary(model)),
        entry("input_embedding.positions", "roberta.embeddings.position_embeddings.weight", PadRows(front=unused)),
        entry("input_embedding.token_types", "roberta.embeddings.token_type_embeddings.weight"),
        *linear("input_embedding.norm", "roberta.embeddings.LayerNorm"),
        *encoder_layers(model, "roberta.encoder.layer.{}"),
        *linear("masked_head.dense", "lm_head.dense"),
        *linear("masked_head.norm", "lm_head.layer_norm"),
        entry("output_bias.bias", "lm_head.bias", padded_vocabulary(model)),
    ]


def to_model(hf: HfConfig, weights: Weights) -> dict[str, Any]:
    """Translate config.json. Their max_position_embeddings counts the rows in front of the first position, ours not."""
    hf.only("hidden_act", "gelu")
    first = _first_position(hf)
    return {
        "architecture": "roberta",
        **encoder_to_model(hf),
        "max_position_embeddings": hf.integer("max_position_embeddings", 512) - first,
        "position_offset": first,
        "activation": "gelu",
    }


def to_hf(model: ModelConfig, ids: Ids) -> dict[str, Any]:
    """Write config.json.

    Raises:
        ConversionError: if the model has no row in front of the first position, where theirs has the padding's.
    """
    if model.position_offset < 1:
        raise ConversionError("RoBERTa has at least 1", field="model.position_offset", value=model.position_offset)
    pad_id = ids.get("pad_token_id")
    pad_id = model.position_offset - 1 if pad_id is None else pad_id
    return {
        **encoder_to_hf(model),
        "max_position_embeddings": model.max_position_embeddings + pad_id + 1,
        **ids,
        "pad_token_id": pad_id,
    }


def _first_position(hf: HfConfig) -> int:
    return hf.integer("pad_token_id", _PAD_ID) + 1


FAMILY = Family(
    model_type="roberta",
    architectures=("RobertaForMaskedLM",),
    prefix="roberta.",
    table=table,
    to_model=to_model,
    to_hf=to_hf,
    copies={
        "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
        "lm_head.decoder.bias": "lm_head.bias",
    },
    buffers=(r"roberta\.embeddings\.(position_ids|token_type_ids)",),
    left_out=(r"roberta\.pooler\.dense\.(weight|bias)",),
    generates=False,
)
