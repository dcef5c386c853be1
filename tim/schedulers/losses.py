"""The terms of the loss: the time weight, the denoising term per sample, the REPA term."""

from collections.abc import Callable

import torch
import torch.nn.functional as nnf
from torch import Tensor

from tim.schedulers.derivative import at_least_float32, expand_times

# Eq. 12 is `sqrt` of the tangent interval; Soft-Min-SNR is the weight of arXiv 2401.11605. s is sigma_d.
TIME_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "constant": lambda delta, s: torch.ones_like(delta),
    "reciprocal": lambda delta, s: 1 / (delta + s),
    "sqrt": lambda delta, s: (delta + s) ** -0.5,
    "square": lambda delta, s: (delta + s) ** -2,
    "Soft-Min-SNR": lambda delta, s: 1 / (delta**2 + s**2),
}


def denoising_loss(F_pred: Tensor, F_target: Tensor, kept: Tensor, use_dir_loss: bool) -> Tensor:
    """|F_pred - F_target|² averaged over each sample (B,), plus the directional term 1 - cos along the channels.

    Args:
        F_pred, F_target: (B, C, H, W).
        kept: (B,) bool; the loss of the others is 0, and so is its gradient.
        use_dir_loss: add the mean over positions of 1 - cos(F_pred, F_target). Where F_pred is 0, as in the first step of a
            network that starts at 0, it has no direction and the term no gradient.
    """
    # Cut out before the square: 0 * inf would still be NaN in the gradient.
    mask = expand_times(kept, F_target)
    F_pred = torch.where(mask, at_least_float32(F_pred), torch.zeros_like(F_target))
    F_target = torch.where(mask, F_target, torch.zeros_like(F_target))
    loss = ((F_pred - F_target) ** 2).flatten(1).mean(1)
    if use_dir_loss:
        cosine = nnf.cosine_similarity(F_pred, F_target, dim=1)
        # The gradient of a cosine is 1 / |F|; at F = 0 the library would make 1e8 of it, which says nothing.
        cosine = torch.where(F_pred.detach().ne(0).any(1), cosine, torch.zeros_like(cosine))
        loss = loss + (1 - cosine).flatten(1).mean(1)
    return loss


def limit_residual(F_target: Tensor, F_pred: Tensor, first: int, clip: float | None, direction: bool) -> Tensor:
    """F_target (B, C, H, W) with another residual F_target - F_pred in the samples from `first` on, whose r is not t.

    Args:
        clip: bound of the residual's elements, or None.
        direction: divide each sample's residual by its root mean square, as the tangent is in arXiv 2410.11081.
    """
    if clip is None and not direction:
        return F_target
    F_pred = F_pred.detach()[first:].to(F_target.dtype)
    residual = F_target[first:] - F_pred
    if clip is not None:
        residual = residual.clamp(-clip, clip)
    if direction:
        size = expand_times((residual**2).flatten(1).mean(1).sqrt(), residual)
        residual = torch.where(size > 0, residual / size, residual)
    return torch.cat([F_target[:first], F_pred + residual])


def balance(losses: Tensor, first: int, kept: Tensor) -> Tensor:
    """Losses (B,) with those from `first` on, whose r is not t, scaled to the mean of those before, of the kept ones alone.

    Within this micro-batch of this process: where it has samples of one kind alone, they stay.
    """
    value, later = losses.detach(), torch.arange(len(losses), device=losses.device) >= first
    before, after = mean_of_kept(value, kept & ~later), mean_of_kept(value, kept & later)
    factor = torch.where((before > 0) & (after > 0), before / after, torch.ones_like(after))
    return torch.where(later, factor * losses, losses)


def mean_of_kept(values: Tensor, kept: Tensor) -> Tensor:
    """The mean of values (B,) where kept (B,) is True; 0 when it nowhere is."""
    weights = kept.to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def projection_loss(h_proj: Tensor, h_target: Tensor) -> Tensor:
    """REPA (arXiv 2410.06940): mean over samples and tokens of 1 - cos(h_proj, h_target), both (B, N, D).

    Raises:
        ValueError: when the two grids or widths differ.
    """
    if h_proj.shape != h_target.shape:
        raise ValueError(f"REPA features {tuple(h_target.shape)} do not match the projection {tuple(h_proj.shape)}")
    return 1 - nnf.cosine_similarity(at_least_float32(h_proj), at_least_float32(h_target), dim=-1).mean()


def finite_samples(v: Tensor) -> Tensor:
    """(B,) bool: every element of the sample is finite."""
    return torch.isfinite(v).flatten(1).all(1)
