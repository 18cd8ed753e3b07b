"""The classifiers of probing."""

from __future__ import annotations

import torch
from torch import nn

from lmscale.parallel.seeds import hash_seed
from lmscale.plan.probing import PROBE

_STD = 0.02


class ProbeHead(nn.Module):
    """A classifier on features; its parameters are those of `plan.probing.probe_shapes`.

    Of features x:
        mix_weights, mix_scale   x <- scale sum_l softmax(weights)_l x_l          the layers' scalar mix
        query                    x <- sum_s softmax(query . x / sqrt(h))_s x_s    over the tokens
        hidden                   x <- relu(hidden x + b)
        classifier               outputs = classifier x + b

    Matrices and the query are drawn from N(0, 0.02), biases are 0; a mix begins with equal weights and a scale of 1.

    Shapes: features [u, h]; [u, s, h] with a query; a mix has them as [u, l, h] or [u, l, s, h]; outputs [u, c].

    Args:
        shapes: of the parameters, by name.
        seed: equal seeds draw equal parameters.
    Source: the scalar mix is that of Peters et al. 2018, arXiv:1802.05365, eq. 1.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], seed: int = 0):
        super().__init__()
        shapes = {name.removeprefix(f"{PROBE}."): shape for name, shape in shapes.items()}
        for name in ("mix_weights", "mix_scale", "query"):
            made = nn.Parameter(torch.zeros(shapes[name])) if name in shapes else None
            self.register_parameter(name, made)
        self.hidden = _linear(shapes["hidden.weight"]) if "hidden.weight" in shapes else None
        self.classifier = _linear(shapes["classifier.weight"])
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name == "mix_scale":
                    parameter.fill_(1.0)
                elif name == "query" or parameter.dim() > 1:
                    generator = torch.Generator().manual_seed(hash_seed(PROBE, seed, name))
                    parameter.normal_(0.0, _STD, generator=generator)
                else:
                    parameter.zero_()

    def forward(self, features: torch.Tensor, is_token: torch.Tensor | None = None) -> torch.Tensor:
        """Compute outputs.

        Args:
            features: fp32.
            is_token: bool [u, s], where there is no padding; read with a query. Left out, everywhere.
        """
        if self.mix_weights is not None:
            features = self.mix_scale * torch.einsum("l,ul...->u...", self.mix_weights.softmax(dim=0), features)
        if self.query is not None:
            scores = features @ self.query / features.size(-1) ** 0.5
            if is_token is not None:
                scores = scores.masked_fill(~is_token, -torch.inf)
            features = torch.einsum("us,ush->uh", scores.softmax(dim=1), features)
        if self.hidden is not None:
            features = torch.relu(self.hidden(features))
        outputs: torch.Tensor = self.classifier(features)
        return outputs


def _linear(shape: tuple[int, ...]) -> nn.Linear:
    return nn.utils.skip_init(nn.Linear, shape[1], shape[0])
