"""Exponential moving average of the weights."""

import copy

import torch
from torch import Tensor, nn

from tim.training.sharding import local, reshard


class EMA:
    """A frozen copy of the network that follows it: ema = decay * ema + (1 - decay) * weights.

    Sharded like the network (`tim.training.sharding.shard`), it follows shard by shard, with the same bits.

    Args:
        network: the bare (unwrapped) network.
        decay: per optimiser step.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, skip: Tensor) -> None:
        """One step towards the network.

        Args:
            skip: 0-dim on the device, 0 to take the step, 1 to leave every bit as it is (`tim.training.guards`).
        """
        reshard(self.network)  # model guidance and previews leave parts gathered, which would go stale
        mine = [local(p) for p in self.network.parameters()]
        theirs = [local(p.detach()) for p in network.parameters()]
        # A factor of 0 instead of an `if`: nobody has to wait for the device to tell.
        weight = {dtype: (1 - self.decay) * (1 - skip.to(dtype)) for dtype in {p.dtype for p in mine}}
        torch._foreach_lerp_(mine, theirs, [weight[p.dtype] for p in mine])
