"""The interval [r, t] of every sample: two draws of the time law, and the shares with r = t and r = T_min (Tab. 8, 11)."""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor

from tim.distributed import to_device
from tim.schedulers.transport import Transport


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


def draw_times(transport: Transport, normal: Tensor, device: torch.device | str) -> Tensor:
    """Times (batch_size,) float32 by the transport's law, each a function of its own standard normal draw.

    Args:
        normal: standard normal draws (batch_size,). A subclass that overrides `sample_t(batch_size, dtype, device)` alone draws
            for itself: one time after the other, torch's generator being seeded by the sample's normal.
    """
    known = inspect.signature(transport.sample_t).parameters.values()
    if any(p.name == "normal" or p.kind is p.VAR_KEYWORD for p in known):
        return transport.sample_t(len(normal), torch.float32, device, normal=normal)
    times = []
    with torch.random.fork_rng(devices=[]):
        for bits in normal.cpu().float().view(torch.int32).tolist():
            torch.manual_seed(bits)  # which reads no more than 32 bits
            times.append(transport.sample_t(1, torch.float32, torch.device("cpu")).reshape(1))
    return to_device(torch.cat(times).clamp(transport.T_min, transport.T_max), device)
