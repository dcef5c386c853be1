"""A transport: four scalar functions of time and everything that follows from them (arXiv 2509.04394, sections 3.1-3.2).

A transport fixes the path ``x_t = alpha x + sigma z`` and what the network predicts,
``F* = alpha_hat x + sigma_hat z``. Writing ``C = sigma_hat alpha - alpha_hat sigma``, the pair
``(x_t, F*)`` determines ``(x, z)`` and therefore the state at every other time r (Eq. 3-7):

    x_r = A(t, r) x_t + B(t, r) F,   A = (alpha_r sigma_hat_t - sigma_r alpha_hat_t) / C_t,
                                     B = (sigma_r alpha_t - alpha_r sigma_t) / C_t,

and, by the state transition identity (Eq. 8), the training target (Eq. 9)

    F_target = F* + B / (dB/dt) (alpha_hat' x + sigma_hat' z - dF/dt).

`Transport` implements these from the four functions alone; `tim.schedulers.transports` has the five of the paper.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tim.distributed import to_device


class PathCoefficients(NamedTuple):
    """x_t = alpha x + sigma z and the time derivatives of both coefficients."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor


class PredictionCoefficients(NamedTuple):
    """F* = alpha_hat x + sigma_hat z and the time derivatives of both coefficients."""

    alpha_hat: Tensor
    sigma_hat: Tensor
    d_alpha_hat: Tensor
    d_sigma_hat: Tensor


@dataclass(eq=False, kw_only=True)
class Transport:
    """Base class: subclasses give `interpolant`, `prediction`, `c_noise` and `time_from_normal`.

    Args:
        T_max, T_min: ends of the time domain, T_max the noise side.
        sigma_d: standard deviation of the data.
        enhance_target: train on guided targets (model guidance).
        w_gt, w_cond: weights of the data target and the conditional prediction; the unconditional one
            weighs 1 - w_gt - w_cond.
        w_start, w_end: the guided window of times, in raw time, both ends included.

    Raises:
        ValueError: for an empty time domain or a non-positive sigma_d.
    """

    T_max: float
    T_min: float
    sigma_d: float = 1.0
    enhance_target: bool = False
    w_gt: float = 1.0
    w_cond: float = 0.0
    w_start: float = 0.0
    w_end: float = 1.0

    def __post_init__(self) -> None:
        if not self.T_min < self.T_max:
            raise ValueError(f"{type(self).__name__} needs T_min < T_max, got T_min={self.T_min} and T_max={self.T_max}")
        if not self.sigma_d > 0:
            raise ValueError(f"{type(self).__name__} needs sigma_d > 0, got {self.sigma_d}")

    # ---- what a transport is -------------------------------------------------------------------
    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha, sigma and their derivatives at t, each shaped like t."""
        raise NotImplementedError

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """alpha_hat, sigma_hat and their derivatives at t, each shaped like t."""
        raise NotImplementedError

    def c_noise(self, t: Tensor) -> Tensor:
        """The time the network sees, same shape as t."""
        return t

    def time_from_normal(self, n: Tensor) -> Tensor:
        """Map standard normal draws to times; the result may leave [T_min, T_max] and is clamped by `sample_t`."""
        raise NotImplementedError

    # ---- what follows from it ------------------------------------------------------------------
    def sample_t(
        self,
        batch_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        normal: Tensor | None = None,
    ) -> Tensor:
        """Draw times (batch_size,) by the transport's law, clamped to [T_min, T_max].

        Args:
            normal: standard normal draws (batch_size,) to map; drawn here when None. Handing them in
                makes the times a pure function of the caller's randomness.
        """
        normal = torch.randn(batch_size) if normal is None else normal
        # Vectorised and scalar float32 code round exp differently, so a sample's time would depend on the batch size.
        # On the CPU, the same on every device.
        t = self.time_from_normal(normal.cpu().double())
        return to_device(t.clamp(self.T_min, self.T_max).to(dtype), device)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (A, B) of x_r = A x_t + B F, each shaped like t and r broadcast (Eq. 3-7)."""
        at_t, at_r, hat = self.interpolant(t), self.interpolant(r), self.prediction(t)
        c = hat.sigma_hat * at_t.alpha - hat.alpha_hat * at_t.sigma
        a = (at_r.alpha * hat.sigma_hat - at_r.sigma * hat.alpha_hat) / c
        b = (at_r.sigma * at_t.alpha - at_r.alpha * at_t.sigma) / c
        return a, b

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt), the weight of the derivative term in the transition identity (Eq. 8); zero at t = r."""
        at_t, at_r, hat = self.interpolant(t), self.interpolant(r), self.prediction(t)
        c = hat.sigma_hat * at_t.alpha - hat.alpha_hat * at_t.sigma
        d_c = (
            hat.d_sigma_hat * at_t.alpha
            + hat.sigma_hat * at_t.d_alpha
            - hat.d_alpha_hat * at_t.sigma
            - hat.alpha_hat * at_t.d_sigma
        )
        # B = b_c / c, so B / (dB/dt) = b_c c / (b_c' c - b_c c'): no division by c², which may be tiny near the ends.
        b_c = at_r.sigma * at_t.alpha - at_r.alpha * at_t.sigma
        d_b_c = at_r.sigma * at_t.d_alpha - at_r.alpha * at_t.d_sigma
        return b_c * c / (d_b_c * c - b_c * d_c)

    def diffusion_target(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """F* = alpha_hat x + sigma_hat z, the target at r = t, where the objective is diffusion training (Eq. 31)."""
        hat = self.prediction(t)
        return hat.alpha_hat * x + hat.sigma_hat * z

    def path(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """State x_t = alpha x + sigma z and velocity v_t = alpha' x + sigma' z; t shaped to broadcast with x and z."""
        at = self.interpolant(t)
        return at.alpha * x + at.sigma * z, at.d_alpha * x + at.d_sigma * z

    def estimates(self, x_t: Tensor, F: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Invert (x_t, F) to the clean and noise estimates (x, z)."""
        return _solve(x_t, F, *self._equations(t))

    def _equations(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """alpha, sigma, alpha_hat and sigma_hat at t, and their determinant."""
        at, hat = self.interpolant(t), self.prediction(t)
        return at.alpha, at.sigma, hat.alpha_hat, hat.sigma_hat, hat.sigma_hat * at.alpha - hat.alpha_hat * at.sigma

    def guided_target(self, F_star: Tensor, t: Tensor, F_cond: Tensor | float, F_uncond: Tensor | float) -> Tensor:
        """Model guidance (Eq. 51): inside the window, w_gt F* + w_cond F_c + (1 - w_gt - w_cond) F_u; F* outside it.

        Args:
            F_star, F_cond, F_uncond: diffusion target and predictions at (t, t), (B, ...).
            t: raw times shaped to broadcast with them.
        """
        guided = self.w_gt * F_star + self.w_cond * F_cond + (1 - self.w_gt - self.w_cond) * F_uncond
        return torch.where((t >= self.w_start) & (t <= self.w_end), guided, F_star)

    def target(
        self,
        x_t: Tensor,
        v_t: Tensor,
        x: Tensor,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        dF_dv_dt: Tensor | float,
        F_t_cond: Tensor | float = 0.0,
        F_t_uncond: Tensor | float = 0.0,
        enhance_target: bool = False,
    ) -> Tensor:
        """The training target (Eq. 9), F* + B / (dB/dt) (alpha_hat' x + sigma_hat' z - dF/dt).

        Args:
            x_t, v_t: state and velocity; unused, x and z determine the target (part of the call for compatibility).
            x, z: clean latents and noise (B, ...).
            t, r: times shaped to broadcast with x.
            dF_dv_dt: total derivative of the network along the path, shaped like x, or 0.
            F_t_cond, F_t_uncond: predictions at (t, t) for model guidance.
            enhance_target: mix them into F* inside the window.

        Returns:
            The target of F(x_t, t, r), shaped like x.
        """
        F_star = self.diffusion_target(x, z, t)
        if enhance_target:
            F_star = self.guided_target(F_star, t, F_t_cond, F_t_uncond)
        hat = self.prediction(t)
        d_F_star = hat.d_alpha_hat * x + hat.d_sigma_hat * z  # how F* moves along the path of (x, z)
        return F_star + self.identity_factor(t, r) * (d_F_star - dF_dv_dt)

    def from_x_t_to_x_r(
        self, x_t: Tensor, t: Tensor, r: Tensor, F: Tensor, s_ratio: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """The transition x_t -> x_r (Eq. 3-7), with the share `s_ratio` of the noise drawn anew (Alg. 2, Eq. 30).

        Re-noising keeps the marginal at any step size: x_r = alpha_r x̂ + sqrt(sigma_r² - eta²) ẑ + eta eps with
        eta² from `renoise_variance`.

        Args:
            x_t, F: state and prediction (B, ...).
            t, r: times shaped to broadcast with x_t, r <= t.
            s_ratio: stochasticity ratio rho >= 0.
            noise: eps shaped like x_t; drawn here when None and needed.
        """
        return jump(x_t, F, self.jump_coefficients(t, r, s_ratio), noise)

    def jump_coefficients(self, t: Tensor, r: Tensor, s_ratio: float = 0.0) -> tuple[Tensor, ...]:
        """All that `jump` takes from the times, each shaped like t and r broadcast.

        Returns:
            (A, B); with noise drawn anew, what determines the two estimates and the weights of x̂, ẑ and eps.
        """
        if s_ratio == 0.0:
            return self.transition(t, r)
        at_r, eta2 = self.interpolant(r), self.renoise_variance(t, r, s_ratio)
        # A and B give ẑ the whole of sigma_r; with a part of it drawn anew the two estimates are weighed apart.
        return *self._equations(t), at_r.alpha, (at_r.sigma**2 - eta2).clamp(min=0).sqrt(), eta2.sqrt()

    def renoise_variance(self, t: Tensor, r: Tensor, s_ratio: float) -> Tensor:
        """eta² = 2 rho dt (alpha sigma sigma' - alpha' sigma²) at t (Eq. 30), within [0, sigma_r²]."""
        at, sigma_r = self.interpolant(t), self.interpolant(r).sigma
        eta2 = 2 * s_ratio * (t - r) * (at.alpha * at.sigma * at.d_sigma - at.d_alpha * at.sigma**2)
        return torch.minimum(eta2.clamp(min=0), sigma_r**2)

    def time_grid(self, num_steps: int, T_max: float, T_min: float) -> Tensor:
        """num_steps + 1 times from T_max down to T_min in float64, equally spaced unless the transport says otherwise."""
        return torch.linspace(T_max, T_min, num_steps + 1, dtype=torch.float64)

    def initial_scale(self, T_max: float) -> float:
        """The factor of z in x_{T_max}: sigma(T_max)."""
        return float(self.interpolant(torch.tensor(T_max, dtype=torch.float64)).sigma)

    def final_state(self, x: Tensor, T_min: float) -> Tensor:
        """From the state at T_min to the image; the identity unless alpha(T_min) has to be divided out."""
        return x

    def weight_tangent(self, t: Tensor) -> Tensor:
        """The time transform of `weight_time_tangent` (Eq. 12): tan(t), the noise-to-data ratio of TrigFlow at t."""
        return torch.tan(t)


def jump(x_t: Tensor, F: Tensor, coefficients: tuple[Tensor, ...], noise: Tensor | None = None) -> Tensor:
    """x_r of a transition whose coefficients are known, see `Transport.from_x_t_to_x_r`.

    Args:
        coefficients: of `Transport.jump_coefficients`.
        noise: eps shaped like x_t; drawn here when None and needed.
    """
    if len(coefficients) == 2:
        a, b = coefficients
        return a * x_t + b * F
    *equations, of_x, of_z, of_noise = coefficients
    x_hat, z_hat = _solve(x_t, F, *equations)
    noise = torch.randn_like(x_t) if noise is None else noise
    return of_x * x_hat + of_z * z_hat + of_noise * noise


def _solve(
    x_t: Tensor, F: Tensor, alpha: Tensor, sigma: Tensor, alpha_hat: Tensor, sigma_hat: Tensor, determinant: Tensor
) -> tuple[Tensor, Tensor]:
    """(x, z) of x_t = alpha x + sigma z and F = alpha_hat x + sigma_hat z, by Cramer's rule."""
    return (sigma_hat * x_t - sigma * F) / determinant, (alpha * F - alpha_hat * x_t) / determinant
