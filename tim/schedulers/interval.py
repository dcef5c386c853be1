"""The interval [r, t] of every sample: two draws of the time law, and the shares with r = t and r = T_min (Tab. 8, 11)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tim.schedulers.transports import Transport, draw_times


def draw_interval(
    transport: Transport,
    normal: Tensor,
    shares: tuple[float, float],
    device: torch.device | str = "cpu",
    position: Sequence[int] | Tensor | None = None,
    global_batch_size: int | None = None,
) -> tuple[Tensor, Tensor, int]:
    """The ends t >= r of the intervals.

    Args:
        normal: standard normal draws (B, 2) to map to times.
        shares: of the global batch, at its beginning with r = t and at its end with r = T_min.
        position, global_batch_size: increasing places (B,) of these samples in the global batch; this batch alone when None.

    Returns:
        t, r (B,) float32 and n_diffusion: the first n_diffusion samples have r = t.
    """
    first, second = (draw_times(transport, n, device) for n in normal.unbind(1))
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    # The shares are places in the global batch, so one process may hold none of the samples with r = t, or nothing else.
    total = len(normal) if global_batch_size is None else global_batch_size
    places = range(len(normal)) if position is None else position.tolist() if torch.is_tensor(position) else position
    # Counted in Python: a sum on the device would be waited for, and would cut a compiled graph in two.
    n_diffusion = sum(place < round(shares[0] * total) for place in places)
    n_others = sum(place < total - round(shares[1] * total) for place in places)
    row = torch.arange(len(normal), device=device)
    r = torch.where(row >= n_others, torch.full_like(r, transport.T_min), r)
    r = torch.where(row < n_diffusion, t, r)
    return t, r, n_diffusion
