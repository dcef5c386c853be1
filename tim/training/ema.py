"""Exponential moving average of the weights."""

import copy

import torch
from torch import nn


class EMA:
    """A frozen copy of the network that follows it: ema = decay * ema + (1 - decay) * weights.

    Args:
        network: the bare (unwrapped) network.
        decay: per optimiser step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """One step towards the network."""
        mine = list(self.network.parameters())
        torch._foreach_lerp_(mine, [p.detach() for p in network.parameters()], 1 - self.decay)
