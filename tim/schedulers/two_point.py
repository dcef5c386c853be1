"""The transition identity over a finite step: two points of the path in place of a derivative.

For s between r and t, x_s = A(t, s) x_t + B(t, s) F~ is followed by the network's own jump to r; the prediction that makes one
jump from t of both is

    F^ = [A(s, r) x_s + B(s, r) F(x_s, s, r) - A(t, r) x_t] / B(t, r) = F~ + B(s, r) / B(t, r) (F(x_s, s, r) - F*_s),

where F*_s is what the path through x_t predicts at s. With s = t - ratio (t - r) that is the consistency of alpha-Flow
(arXiv 2510.20771) and SoFlow, and of shortcut models at ratio 1/2; ratio 1 is diffusion training, ratio -> 0 Eq. 9.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tim.schedulers.transport import Transport

DEFAULT_RATIO = 0.1
MIN_RATIO = 0.005  # the rounding of the two predictions is divided by the ratio
STEEPNESS = 10.0  # of the sigmoid from the first ratio to the last


def check_ratio(ratio: float | Sequence[float]) -> None:
    """ValueError unless a ratio, or each of two, is in (0, 1]."""
    ends = ends_of(ratio)
    if len(ends) != 2 or not all(isinstance(value, int | float) and 0 < value <= 1 for value in ends):
        raise ValueError(
            f"two_point_ratio={ratio!r} must be a number in (0, 1] or [start, end] of such, annealed over training"
        )


def ends_of(ratio: float | Sequence[float]) -> Sequence[float]:
    """[start, end], which a constant has twice."""
    return (ratio, ratio) if isinstance(ratio, int | float) else ratio


def ratio_at(ratio: float | Sequence[float], progress: float) -> float:
    """The share of [r, t] between the two points, at least MIN_RATIO.

    Args:
        ratio: a constant, or [start, end] along a sigmoid.
        progress: share of training that is done, in [0, 1].
    """
    start, end = ends_of(ratio)
    # tanh is the sigmoid of twice its argument; scaled, so that both ends are met.
    done = (1 + math.tanh(STEEPNESS / 2 * (progress - 0.5)) / math.tanh(STEEPNESS / 4)) / 2
    return max(MIN_RATIO, start + (end - start) * done)


def two_point_change(
    transport: Transport, path: tuple[Tensor, Tensor], t: Tensor, s: Tensor, r: Tensor, F_t: Tensor, F_s: Tensor
) -> Tensor:
    """What a target has besides F~, so that F + (F^ - F) / (1 - B(s, r) / B(t, r)) is regressed on.

    Dividing by the share of the jump before s keeps the residual from vanishing with the ratio: in the limit it is that of
    Eq. 9 for every transport, B / (dB/dt) (dF*/dt - dF/dt).

    Args:
        path: clean latents and noise (B, C, H, W) of the data's path, along which F* changes.
        t, s, r: raw times shaped to broadcast with them, t >= s >= r.
        F_t, F_s: the predictions F(x_t, t, r) and F(x_s, s, r), without gradient.

    Returns:
        (B, C, H, W); 0 where s = r or t = r.
    """
    _, b_t = transport.transition(t, r)
    _, b_s = transport.transition(s, r)
    change = transport.diffusion_target(*path, t) - transport.diffusion_target(*path, s) - (F_t - F_s)
    whole = b_t - b_s
    return (
        torch.where(whole != 0, b_s / torch.where(whole != 0, whole, torch.ones_like(whole)), torch.zeros_like(whole)) * change
    )
