"""Guidance as an input of the network (improved MeanFlow, arXiv 2512.02012): classifier-free guidance in one evaluation.

At every state the network learns to predict what guidance of the scale w would make of its own predictions,

    F~ = F* + (1 - 1/w) (F(x_t, t, t, w, c) - F(x_t, t, t, null)),

whose fixed point is F(., null) + w (F(., c) - F(., null)). Outside of its interval of times, and without a condition, F~ = F*.
"""

import torch
from torch import Tensor

UNGUIDED_SHARE = 0.25  # of the samples that have w = 1: the end of a range is learned from one side alone
FULL_SHARE = 0.5  # of the samples whose interval is all times; the others' ends are uniform in both halves


def draw_guidance(uniform: Tensor, largest: float, dropped: Tensor | None = None) -> Tensor:
    """Guidance (B, 3): the scale w, 1 or log-uniform in [1, largest], and the ends of its interval as fractions of T_max.

    Args:
        uniform: draws in [0, 1) (B, 4).
        dropped: (B,) bool, samples that lost their condition: not guided, as the unconditional prediction is asked for.
    """
    if dropped is not None:
        uniform = torch.where(dropped[:, None], torch.zeros_like(uniform), uniform)  # w = 1 at all times
    scale, full, low, high = uniform.unbind(1)
    exponent = ((scale - UNGUIDED_SHARE) / (1 - UNGUIDED_SHARE)).clamp(min=0)
    everywhere = full < FULL_SHARE
    low = torch.where(everywhere, torch.zeros_like(low), low / 2)
    high = torch.where(everywhere, torch.ones_like(high), 1 - high / 2)
    return torch.stack([largest**exponent, low, high], dim=1)


def guidance_share(guidance: Tensor, t: Tensor, T_max: float) -> Tensor:
    """The factor 1 - 1/w (B,) of F(w, c) - F(null) in the target; 0 outside of the interval.

    Args:
        guidance: (B, 3), see `draw_guidance`. t: raw times (B,).
    """
    scale, low, high = guidance.to(t.dtype).unbind(1)
    guided = (t >= low * T_max) & (t <= high * T_max)
    return torch.where(guided, 1 - 1 / scale, torch.zeros_like(scale))
