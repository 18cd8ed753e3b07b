"""What lmscale's training step is measured against: a plain PyTorch GPT and HF transformers' GPT-2.

They and lmscale's Engine stand under one interface: `step(tokens, labels)` does forward, loss, backward, clipping and
update. All take AdamW with OPTIM's settings, no decay on biases and norms, the norm clipped at 1.0, and draw weights of the same
shapes. In bf16 every one of them computes forward and backward in bf16 and updates fp32 master weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from lmscale.config.model import ModelConfig
from lmscale.config.run import RunConfig, ZeroChoice

LR = 1.0e-4
MAX_GRAD_NORM = 1.0
OPTIM: dict[str, Any] = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1.0e-8}


class Trainer(Protocol):
    """What is measured."""

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on a batch, int64 [b, s] each, and return its loss."""


class PlainGpt(nn.Module):
    """GPT-2 as a short script has it: SDPA, a tied head, no dropout. Compiled layer by layer on request."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        hidden = model.hidden_size
        self.words = nn.Embedding(model.padded_vocab_size, hidden)
        self.positions = nn.Embedding(model.max_position_embeddings, hidden)
        self.blocks = nn.ModuleList([PlainBlock(hidden, model.num_attention_heads) for _ in range(model.num_layers)])
        self.norm = nn.LayerNorm(hidden)
        self.apply(_draw)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy."""
        place = torch.arange(tokens.size(1), device=tokens.device)
        hidden = self.words(tokens) + self.positions(place)
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden), self.words.weight)
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc, self.out = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Transform [b, s, h]."""
        batch, length, width = hidden.shape
        q, k, v = self.qkv(self.norm_1(hidden)).split(width, dim=2)
        q, k, v = (x.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden = hidden + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.out(F.gelu(self.fc(self.norm_2(hidden)), approximate="tanh"))


class TorchTrainer:
    """A torch model with fused AdamW; in bf16 the optimizer holds fp32 copies of the bf16 weights."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor], precision: str):
        self._model, self._loss = model, loss
        self._weights = [weight for weight in model.parameters() if weight.requires_grad]
        self._masters = self._weights
        if precision == "bf16":
            self._masters = [nn.Parameter(weight.detach().clone()) for weight in self._weights]
            model.bfloat16()
        decayed = [master for master in self._masters if master.dim() > 1]
        others = [master for master in self._masters if master.dim() <= 1]
        self._optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": OPTIM["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
            lr=LR,
            betas=(OPTIM["adam_beta1"], OPTIM["adam_beta2"]),
            eps=OPTIM["adam_eps"],
            fused=True,
        )

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on a batch."""
        loss = self._loss(self._model, tokens, labels)
        loss.backward()
        with torch.no_grad():
            if self._masters is not self._weights:
                for master, weight in zip(self._masters, self._weights, strict=True):
                    assert weight.grad is not None
                    master.grad = weight.grad.float()
                    weight.grad = None
            nn.utils.clip_grad_norm_(self._masters, MAX_GRAD_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            if self._masters is not self._weights:
                torch._foreach_copy_(self._weights, self._masters)
        return loss.item()


class LmscaleTrainer:
    """lmscale's engine, fed one micro batch a step as the loader would."""

    def __init__(self, config: RunConfig, engine: Any):
        self.engine, self._step = engine, 0
        self._micro_batches = config.batch.global_batch_size // config.batch.micro_batch_size // engine.topology.dp_size

    def step(self, tokens: torch.Tensor, labels: torch.Tensor) -> float:
        """Train on a batch, cut into the micro batches."""
        self._step += 1
        mask = torch.ones(labels.shape, dtype=torch.float32)
        parts = zip(*(x.chunk(self._micro_batches) for x in (tokens.cpu(), labels.cpu(), mask)), strict=True)
        batches = [{"tokens": t, "labels": y, "loss_mask": m} for t, y, m in parts]
        return self.engine.train_step(batches, self._micro_batches, self._step, LR).loss.item()


def plain_trainer(model: ModelConfig, precision: str, device: torch.device, compile: bool = False) -> TorchTrainer:
    """Build the plain PyTorch GPT."""
    plain = PlainGpt(model).to(device)
    if compile:
        plain.compile()
    return TorchTrainer(plain, lambda module, tokens, labels: module(tokens, labels), precision)


def hf_trainer(model: ModelConfig, precision: str) -> TorchTrainer:
    """Build transformers' GPT-2, with SDPA and its own loss, dropout off."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=model.padded_vocab_size,
        n_positions=model.max_position_embeddings,
        n_embd=model.hidden_size,
        n_layer=model.num_layers,
        n_head=model.num_attention_heads,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
    )
    hf = GPT2LMHeadModel(config).train()
    # `labels` are shifted inside; these are shifted already, which its loss function takes as they are.
    return TorchTrainer(
        hf, lambda module, tokens, labels: module(input_ids=tokens, labels=labels, shift_labels=labels).loss, precision
    )


def lmscale_config(
    model: ModelConfig, precision: str, stage: int, seq_length: int, batch: int, micro_batch: int, compile: bool = False
) -> RunConfig:
    """Make a run's config for one of the measurements; its data is never read."""
    return RunConfig.model_validate(
        {
            "model": model.model_dump(),
            "data": {"train": [{"prefix": "unread"}], "seq_length": seq_length},
            "precision": precision,
            "batch": {"micro_batch_size": micro_batch, "global_batch_size": batch},
            "optim": {"lr": LR, "max_grad_norm": MAX_GRAD_NORM, **OPTIM},
            "train": {"train_tokens": 10**12, "compile": compile},
            "deepspeed": {"zero_optimization": {"stage": stage}},
            "output_dir": "unwritten",
        }
    )


def lmscale_trainer(config: RunConfig, topology: Any) -> LmscaleTrainer:
    """Build lmscale's engine as `lmscale.pretrain` does.

    Collectives: every rank must call.
    """
    from lmscale.pretrain import build_engine

    stage = int(config.deepspeed["zero_optimization"]["stage"])  # type: ignore[index]
    return LmscaleTrainer(config, build_engine(config, topology, ZeroChoice(stage=stage)))


def _draw(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)
