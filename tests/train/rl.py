"""A model whose distributions can be written down: the next id depends on the last one alone."""

from __future__ import annotations

import torch
from torch import nn

from peftlib import LoRA, NewHead, attach, use
from peftlib.train import init_head

V = 4


class Chain(nn.Sequential):
    """Logits of the next id are a row of a matrix; a tuning of full rank can reach any."""

    def __init__(self, seed: int = 0):
        torch.manual_seed(seed)
        super().__init__(nn.Embedding(V, 8), nn.Linear(8, V))
        with torch.no_grad():
            self[0].weight.copy_(torch.eye(V, 8))
            self[1].weight.mul_(0.3)
            self[1].bias.zero_()

    def probabilities(self, last: int = 0) -> torch.Tensor:
        with torch.no_grad():
            return self(torch.tensor([[last]]))[0, 0].softmax(-1)


def policy_and_value(seed: int = 0):
    model = Chain(seed)
    policy = attach(model, {"1": LoRA(rank=4, alpha=8)}, name="policy")
    value = init_head(attach(model, {"1": NewHead(1)}, name="value"))
    use(model, "policy")
    return model, policy, value
