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
        share: keep no second copy of what is not trained. Sharding would take it from the network.
    """

    def __init__(self, network: nn.Module, decay: float, share: bool = False) -> None:
        frozen = {id(p): p for p in network.parameters() if share and not p.requires_grad}
        self.network = copy.deepcopy(network, frozen).eval().requires_grad_(False)  # deepcopy takes them for copied already
        self.decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, skip: Tensor) -> None:
        """One step towards the network.

        Args:
            skip: 0-dim on the device, 0 to take the step, 1 to leave every bit as it is (`tim.training.guards`).
        """
        reshard(self.network)  # model guidance and previews leave parts gathered, which would go stale
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        mine, theirs = zip(*((local(p), local(q.detach())) for p, q in pairs if q.requires_grad), strict=True)
        # A factor of 0 instead of an `if`: nobody has to wait for the device to tell.
        weight = {dtype: (1 - self.decay) * (1 - skip.to(dtype)) for dtype in {p.dtype for p in mine}}
        torch._foreach_lerp_(mine, theirs, [weight[p.dtype] for p in mine])
