"""Tiny random BERT, RoBERTa, BART and T5 of transformers, and their weights under our names: the truth from outside.

Called in ranks only: transformers is imported there.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from lmscale.evaluate.encoder_decoder import EncoderDecoderModel
from lmscale.evaluate.inference import load
from lmscale.evaluate.masked import MaskedModel
from tests.evaluate.checkpoints import Tensors, run_keys, write_checkpoint
from tests.evaluate.reference import MAX_POSITIONS, PADDED, VOCAB_SIZE

LAYERS, HIDDEN, HEADS, HEAD_DIM, FFN = 2, 32, 4, 6, 48
PAD, BOS, EOS, MASK, CLS, SEP = 1, 2, 3, 4, 5, 6
SENTINELS = [130, 129, 128]
IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
MASKED, SEQ2SEQ = ("bert", "roberta"), ("bart", "t5", "t5-v1.1")

_OURS: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "ffn_hidden_size": FFN,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": MAX_POSITIONS,
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": {**_OURS, "architecture": "bert"},
    "roberta": {**_OURS, "architecture": "roberta"},
    "bart": {**_OURS, "architecture": "bart"},
    "t5": {**_OURS, "architecture": "t5", "head_dim": HEAD_DIM},
    "t5-v1.1": {
        **_OURS,
        "architecture": "t5",
        "head_dim": HEAD_DIM,
        "activation": "geglu",
        "tied_head": False,
        "scaled_logits": False,
    },
}


class IdTokenizer(SimpleNamespace):
    """Texts are numbers with spaces between them."""

    vocab_size = VOCAB_SIZE
    pad_id, bos_id, eos_id, mask_id, cls_id, sep_id = PAD, BOS, EOS, MASK, CLS, SEP
    mask_text = "<mask>"
    sentinel_ids = SENTINELS

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [[int(word) for word in text.split()] for text in texts]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def decode(self, ids: list[int]) -> str:
        return " ".join(str(number) for number in ids if number > SEP and number not in SENTINELS)


def build_reference(family: str) -> Any:
    """Make a random model of transformers in fp32, with biases and norms that are not their neutral values."""
    import transformers as hf

    sizes = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "initializer_range": 0.2,
    }
    torch.manual_seed(3)
    if family == "bert":
        model: Any = hf.BertForPreTraining(hf.BertConfig(**sizes, **IDS, max_position_embeddings=MAX_POSITIONS))
    elif family == "roberta":
        config = hf.RobertaConfig(
            **sizes, **IDS, max_position_embeddings=MAX_POSITIONS + 2, type_vocab_size=1, layer_norm_eps=1e-5
        )
        model = hf.RobertaForMaskedLM(config)
    elif family == "bart":
        stacks = {
            f"{stack}_{key}": value
            for stack in ("encoder", "decoder")
            for key, value in (("layers", LAYERS), ("attention_heads", HEADS), ("ffn_dim", FFN))
        }
        config = hf.BartConfig(
            vocab_size=VOCAB_SIZE,
            d_model=HIDDEN,
            max_position_embeddings=MAX_POSITIONS,
            init_std=0.2,
            decoder_start_token_id=EOS,
            forced_eos_token_id=None,
            **stacks,
            **IDS,
        )
        model = hf.BartForConditionalGeneration(config)
    else:
        is_tied = family == "t5"
        config = hf.T5Config(
            vocab_size=VOCAB_SIZE,
            d_model=HIDDEN,
            d_kv=HEAD_DIM,
            d_ff=FFN,
            num_layers=LAYERS,
            num_heads=HEADS,
            feed_forward_proj="relu" if is_tied else "gated-gelu",
            tie_word_embeddings=is_tied,
            initializer_factor=1.0,
            decoder_start_token_id=PAD,
            pad_token_id=PAD,
            eos_token_id=EOS,
        )
        model = hf.T5ForConditionalGeneration(config)
        if not is_tied:  # transformers ties the two in a new model, whatever the config says
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if family.startswith("t5"):  # otherwise each token is mostly followed by itself
            model.shared.weight.mul_(0.03)
            for stack in (model.encoder, model.decoder):
                stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight.mul_(20.0)
    return model.float().eval()


def load_pair(directory: str, family: str) -> tuple[MaskedModel | EncoderDecoderModel, Any]:
    """Load a reference's weights, written as a checkpoint, and return (ours, the reference)."""
    reference = build_reference(family)
    tensors = to_logical(family, {name: tensor.detach() for name, tensor in reference.state_dict().items()})
    keys = run_keys(
        MODELS[family], tokenizer={"path": "unread"}, data={"train": [{"prefix": "unread"}], "seq_length": 32}
    )
    keys["objective"] = {"name": MODELS[family]["architecture"]}
    model = load(write_checkpoint(Path(directory) / family, keys, tensors))
    model.tokenizer = IdTokenizer()
    return model, reference


def to_logical(family: str, theirs: Tensors) -> Tensors:
    """Rename and rearrange; the rows that pad the vocabulary hold large values: whatever reads them shows."""
    convert = {"bert": _bert, "roberta": _roberta, "bart": _bart}
    tensors = convert[family](theirs) if family in convert else _t5(theirs, family)
    for name in ("word_embedding.table.weight", "head.table.weight", "output_bias.bias"):
        if name in tensors:
            missing = PADDED - VOCAB_SIZE
            pads = (0, missing) if tensors[name].dim() == 1 else (0, 0, 0, missing)
            tensors[name] = F.pad(tensors[name], pads, value=7.0)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _heads(*parts: torch.Tensor) -> torch.Tensor:
    """Stack the rows of the parts head by head: [q; k; v] or [k; v] of the first head, then of the second, ..."""
    return torch.cat([head for heads in zip(*(part.chunk(HEADS) for part in parts), strict=True) for head in heads])


def _both(ours: str, their: str, tensors: Tensors) -> Tensors:
    return {f"{ours}.{kind}": tensors[f"{their}.{kind}"] for kind in ("weight", "bias") if f"{their}.{kind}" in tensors}


def _attention(ours: str, their: str, names: str, proj: str, tensors: Tensors, is_cross: bool = False) -> Tensors:
    found = _both(f"{ours}.linear_proj", f"{their}.{proj}", tensors)
    for kind in ("weight", "bias"):
        if f"{their}.{names.format('q')}.{kind}" not in tensors:
            continue
        query, key, value = (tensors[f"{their}.{names.format(letter)}.{kind}"] for letter in "qkv")
        if is_cross:
            found |= {f"{ours}.linear_q.{kind}": query, f"{ours}.linear_kv.{kind}": _heads(key, value)}
        else:
            found[f"{ours}.linear_qkv.{kind}"] = _heads(query, key, value)
    return found


def _encoder(prefix: str, theirs: Tensors) -> Tensors:
    # `self_q`, so that one letter names query, key and value.
    short = {"self.query": "self_q", "self.key": "self_k", "self.value": "self_v"}
    tensors = {}
    for name, tensor in theirs.items():
        for old, new in short.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    embeddings = f"{prefix}.embeddings"
    ours = {
        "word_embedding.table.weight": tensors[f"{embeddings}.word_embeddings.weight"],
        "input_embedding.positions": tensors[f"{embeddings}.position_embeddings.weight"],
        "input_embedding.token_types": tensors[f"{embeddings}.token_type_embeddings.weight"],
        **_both("input_embedding.norm", f"{embeddings}.LayerNorm", tensors),
    }
    for index in range(LAYERS):
        new, old = f"layers.{index}", f"{prefix}.encoder.layer.{index}"
        ours |= _attention(f"{new}.attention", f"{old}.attention", "self_{}", "output.dense", tensors)
        ours |= _both(f"{new}.attention_norm", f"{old}.attention.output.LayerNorm", tensors)
        ours |= _both(f"{new}.mlp.linear_fc1", f"{old}.intermediate.dense", tensors)
        ours |= _both(f"{new}.mlp.linear_fc2", f"{old}.output.dense", tensors)
        ours |= _both(f"{new}.mlp_norm", f"{old}.output.LayerNorm", tensors)
    return ours


def _bert(theirs: Tensors) -> Tensors:
    head = "cls.predictions"
    return {
        **_encoder("bert", theirs),
        **_both("masked_head.dense", f"{head}.transform.dense", theirs),
        **_both("masked_head.norm", f"{head}.transform.LayerNorm", theirs),
        **_both("masked_head.pooler", "bert.pooler.dense", theirs),
        **_both("masked_head.next_sentence", "cls.seq_relationship", theirs),
        "output_bias.bias": theirs[f"{head}.bias"],
    }


def _roberta(theirs: Tensors) -> Tensors:
    return {
        **_encoder("roberta", theirs),
        **_both("masked_head.dense", "lm_head.dense", theirs),
        **_both("masked_head.norm", "lm_head.layer_norm", theirs),
        "output_bias.bias": theirs["lm_head.bias"],
    }


def _bart(theirs: Tensors) -> Tensors:
    ours = {"word_embedding.table.weight": theirs["model.shared.weight"]}
    for stack in ("encoder", "decoder"):
        ours[f"{stack}_embedding.positions"] = theirs[f"model.{stack}.embed_positions.weight"]
        ours |= _both(f"{stack}_embedding.norm", f"model.{stack}.layernorm_embedding", theirs)
        for index in range(LAYERS):
            new, old = f"{stack}_layers.{index}", f"model.{stack}.layers.{index}"
            ours |= _attention(f"{new}.attention", f"{old}.self_attn", "{}_proj", "out_proj", theirs)
            ours |= _both(f"{new}.attention_norm", f"{old}.self_attn_layer_norm", theirs)
            if stack == "decoder":
                ours |= _attention(f"{new}.cross_attention", f"{old}.encoder_attn", "{}_proj", "out_proj", theirs, True)
                ours |= _both(f"{new}.cross_attention_norm", f"{old}.encoder_attn_layer_norm", theirs)
            ours |= _both(f"{new}.mlp.linear_fc1", f"{old}.fc1", theirs)
            ours |= _both(f"{new}.mlp.linear_fc2", f"{old}.fc2", theirs)
            ours |= _both(f"{new}.mlp_norm", f"{old}.final_layer_norm", theirs)
    return ours


def _t5(theirs: Tensors, family: str) -> Tensors:
    ours = {"word_embedding.table.weight": theirs["shared.weight"]}
    for stack, norm in (("encoder", "encoder_norm"), ("decoder", "final_norm")):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        ours[f"{stack}_relative_bias.table"] = theirs[first].t()
        ours |= _both(f"{norm}.norm", f"{stack}.final_layer_norm", theirs)
        for index in range(LAYERS):
            new, old = f"{stack}_layers.{index}", f"{stack}.block.{index}.layer"
            ours |= _attention(f"{new}.attention", f"{old}.0.SelfAttention", "{}", "o", theirs)
            ours |= _both(f"{new}.attention_norm", f"{old}.0.layer_norm", theirs)
            last = 1
            if stack == "decoder":
                last = 2
                ours |= _attention(f"{new}.cross_attention", f"{old}.1.EncDecAttention", "{}", "o", theirs, True)
                ours |= _both(f"{new}.cross_attention_norm", f"{old}.1.layer_norm", theirs)
            dense = f"{old}.{last}.DenseReluDense"
            inputs = [
                theirs[f"{dense}.{name}.weight"]
                for name in ("wi", "wi_0", "wi_1")
                if f"{dense}.{name}.weight" in theirs
            ]
            ours[f"{new}.mlp.linear_fc1.weight"] = torch.cat(inputs)
            ours |= _both(f"{new}.mlp.linear_fc2", f"{dense}.wo", theirs)
            ours |= _both(f"{new}.mlp_norm", f"{old}.{last}.layer_norm", theirs)
    if family == "t5-v1.1":
        ours["head.table.weight"] = theirs["lm_head.weight"]
    return ours
