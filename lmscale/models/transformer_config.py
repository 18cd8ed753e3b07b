"""Our config to megatron-core's TransformerConfig, once."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from lmscale.config.model import ModelConfig
from lmscale.models.initialization import matrix_init
from lmscale.parallel.seeds import WeightInit


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """Compute GELU by GPT-2's tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": F.gelu,
    "relu": F.relu,
    "swiglu": F.silu,
    "geglu": gelu_tanh,
}
"""Of the gate, where there is one."""


def build_transformer_config(
    model: ModelConfig, weights: WeightInit, tp_size: int, sequence_parallel: bool
) -> TransformerConfig:
    """Translate a model for megatron-core's modules.

    pipeline_model_parallel_size stays 1 whatever the layout: DeepSpeed's pipeline numbers the layers, and megatron-core
    would add an offset of its own. Fusions that need CUDA extensions or DeepSpeed-foreign gradient buffers stay off.
    """
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_size,
        ffn_hidden_size=model.ffn_size,
        gated_linear_unit=model.is_gated,
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.linear_bias,
        normalization="LayerNorm" if model.normalization == "layernorm" else "RMSNorm",
        layernorm_epsilon=model.norm_eps,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        softmax_scale=None if model.scaled_scores else 1.0,
        init_method=matrix_init(model, weights),
        output_layer_init_method=matrix_init(model, weights, is_residual=True),
        tensor_model_parallel_size=tp_size,
        sequence_parallel=sequence_parallel,
        params_dtype=torch.float32,
        use_cpu_initialization=True,
        perform_initialization=True,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
