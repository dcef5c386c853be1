"""Transports: four scalar functions of time and everything that follows from them.

A transport fixes the path ``x_t = alpha x + sigma z`` and what the network predicts,
``F* = alpha_hat x + sigma_hat z``. Writing ``C = sigma_hat alpha - alpha_hat sigma``, the pair
``(x_t, F*)`` determines ``(x, z)`` and therefore the state at every other time r:

    x_r = A(t, r) x_t + B(t, r) F,   A = (alpha_r sigma_hat_t - sigma_r alpha_hat_t) / C_t,
                                     B = (sigma_r alpha_t - alpha_r sigma_t) / C_t,

and the transition identity (the training target)

    F_target = F* + B / (dB/dt) (alpha_hat' x + sigma_hat' z - dF/dt).

`Transport` implements these from the four functions alone. The five concrete transports override the
coefficients with closed forms, which are better conditioned in float32; the tests hold the two equal.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


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

    def __init__(
        self,
        T_max: float,
        T_min: float,
        sigma_d: float = 1.0,
        enhance_target: bool = False,
        w_gt: float = 1.0,
        w_cond: float = 0.0,
        w_start: float = 0.0,
        w_end: float = 1.0,
    ) -> None:
        if not T_min < T_max:
            raise ValueError(f"{type(self).__name__} needs T_min < T_max, got T_min={T_min} and T_max={T_max}")
        if not sigma_d > 0:
            raise ValueError(f"{type(self).__name__} needs sigma_d > 0, got {sigma_d}")
        self.T_max, self.T_min, self.sigma_d = T_max, T_min, sigma_d
        self.enhance_target = enhance_target
        self.w_gt, self.w_cond, self.w_start, self.w_end = w_gt, w_cond, w_start, w_end

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
        t = self.time_from_normal(normal.cpu().double())
        return t.clamp(self.T_min, self.T_max).to(device=device, dtype=dtype)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients (A, B) of x_r = A x_t + B F."""
        at_t, at_r, hat = self.interpolant(t), self.interpolant(r), self.prediction(t)
        c = hat.sigma_hat * at_t.alpha - hat.alpha_hat * at_t.sigma
        a = (at_r.alpha * hat.sigma_hat - at_r.sigma * hat.alpha_hat) / c
        b = (at_r.sigma * at_t.alpha - at_r.alpha * at_t.sigma) / c
        return a, b

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt), the weight of the derivative term in the transition identity; zero at t = r."""
        at_t, at_r, hat = self.interpolant(t), self.interpolant(r), self.prediction(t)
        c = hat.sigma_hat * at_t.alpha - hat.alpha_hat * at_t.sigma
        d_c = (
            hat.d_sigma_hat * at_t.alpha
            + hat.sigma_hat * at_t.d_alpha
            - hat.d_alpha_hat * at_t.sigma
            - hat.alpha_hat * at_t.d_sigma
        )
        b_c = at_r.sigma * at_t.alpha - at_r.alpha * at_t.sigma
        d_b_c = at_r.sigma * at_t.d_alpha - at_r.alpha * at_t.d_sigma
        return b_c * c / (d_b_c * c - b_c * d_c)

    def diffusion_target(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """F* = alpha_hat x + sigma_hat z."""
        hat = self.prediction(t)
        return hat.alpha_hat * x + hat.sigma_hat * z

    def path_term(self, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """alpha_hat' x + sigma_hat' z: how F* moves along the path of (x, z)."""
        hat = self.prediction(t)
        return hat.d_alpha_hat * x + hat.d_sigma_hat * z

    def estimates(self, x_t: Tensor, F: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Invert (x_t, F) to the clean and noise estimates (x, z)."""
        at, hat = self.interpolant(t), self.prediction(t)
        c = hat.sigma_hat * at.alpha - hat.alpha_hat * at.sigma
        return (hat.sigma_hat * x_t - at.sigma * F) / c, (at.alpha * F - hat.alpha_hat * x_t) / c

    def guided_target(self, F_star: Tensor, t: Tensor, F_cond: Tensor | float, F_uncond: Tensor | float) -> Tensor:
        """Model guidance: inside the window, w_gt F* + w_cond F_c + (1 - w_gt - w_cond) F_u; F* outside it."""
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
        """The transition identity's right-hand side.

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
        return F_star + self.identity_factor(t, r) * (self.path_term(x, z, t) - dF_dv_dt)

    def from_x_t_to_x_r(
        self, x_t: Tensor, t: Tensor, r: Tensor, F: Tensor, s_ratio: float = 0.0, noise: Tensor | None = None
    ) -> Tensor:
        """The transition x_t -> x_r, with the share `s_ratio` of the noise drawn anew.

        Re-noising keeps the marginal: x_r = alpha_r x̂ + sqrt(sigma_r² - eta²) ẑ + eta eps with
        eta² from `renoise_variance`.

        Args:
            x_t, F: state and prediction (B, ...).
            t, r: times shaped to broadcast with x_t, r <= t.
            s_ratio: stochasticity ratio rho >= 0.
            noise: eps shaped like x_t; drawn here when None and needed.
        """
        if s_ratio == 0.0:
            a, b = self.transition(t, r)
            return a * x_t + b * F
        x_hat, z_hat = self.estimates(x_t, F, t)
        at_r = self.interpolant(r)
        eta2 = self.renoise_variance(t, r, s_ratio)
        noise = torch.randn_like(x_t) if noise is None else noise
        return at_r.alpha * x_hat + (at_r.sigma**2 - eta2).clamp(min=0).sqrt() * z_hat + eta2.sqrt() * noise

    def renoise_variance(self, t: Tensor, r: Tensor, s_ratio: float) -> Tensor:
        """eta² = 2 rho dt (alpha sigma sigma' - alpha' sigma²) at t, within [0, sigma_r²]."""
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
        """The time transform of `weight_time_tangent`: tan(t)."""
        return torch.tan(t)


class OT_FM(Transport):
    """Flow matching: x_t = (1-t) x + t z, F* = z - x."""

    def __init__(
        self,
        P_mean: float = 0.0,
        P_std: float = 1.0,
        sigma_d: float = 1.0,
        T_max: float = 1.0,
        T_min: float = 0.0,
        **guidance: float,
    ) -> None:
        super().__init__(T_max, T_min, sigma_d, **guidance)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> PathCoefficients:
        one = torch.ones_like(t)
        return PathCoefficients(1 - t, t, -one, one)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(-one, one, zero, zero)

    def time_from_normal(self, n: Tensor) -> Tensor:
        return torch.sigmoid(self.P_std * n + self.P_mean)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), r - t

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def renoise_variance(self, t: Tensor, r: Tensor, s_ratio: float) -> Tensor:
        """eta² = rho dt (2r - rho dt): the first-order re-noising made exact at any step size."""
        step = s_ratio * (t - r)
        return torch.minimum((step * (2 * r - step)).clamp(min=0), r**2)

    def initial_scale(self, T_max: float) -> float:
        return 1.0


class TrigFlow(Transport):
    """x_t = cos(t) x + sin(t) z, F* = cos(t) z - sin(t) x."""

    def __init__(
        self,
        P_mean: float = -1.0,
        P_std: float = 1.6,
        sigma_d: float = 0.5,
        T_max: float = 1.57,
        T_min: float = 0.0,
        **guidance: float,
    ) -> None:
        super().__init__(T_max, T_min, sigma_d, **guidance)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> PathCoefficients:
        cos, sin = torch.cos(t), torch.sin(t)
        return PathCoefficients(cos, sin, -sin, cos)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        cos, sin = torch.cos(t), torch.sin(t)
        return PredictionCoefficients(-sin, cos, -cos, -sin)

    def time_from_normal(self, n: Tensor) -> Tensor:
        return torch.atan(torch.exp(self.P_std * n + self.P_mean) / self.sigma_d)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cos(t - r), -torch.sin(t - r)

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.tan(t - r)


class EDM(Transport):
    """The EDM parametrisation, normalised to unit variance: t is the noise level, x_t = (x + t z) / S_t."""

    rho = 7.0  # Karras et al. 2022, equation 5

    def __init__(
        self,
        P_mean: float = -1.2,
        P_std: float = 1.2,
        sigma_d: float = 0.5,
        T_max: float = 80.0,
        T_min: float = 0.01,
        **guidance: float,
    ) -> None:
        super().__init__(T_max, T_min, sigma_d, **guidance)
        self.P_mean, self.P_std = P_mean, P_std

    def interpolant(self, t: Tensor) -> PathCoefficients:
        s2 = self.sigma_d**2
        S = torch.sqrt(t**2 + s2)
        return PathCoefficients(1 / S, t / S, -t / S**3, s2 / S**3)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        s = self.sigma_d
        S = torch.sqrt(t**2 + s**2)
        return PredictionCoefficients(t / (s * S), -s / S, s / S**3, s * t / S**3)

    def c_noise(self, t: Tensor) -> Tensor:
        return torch.log(t) / 4

    def time_from_normal(self, n: Tensor) -> Tensor:
        return torch.exp(self.P_std * n + self.P_mean)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        s2 = self.sigma_d**2
        norm = torch.sqrt(t**2 + s2) * torch.sqrt(r**2 + s2)
        return (s2 + t * r) / norm, self.sigma_d * (t - r) / norm

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        s2 = self.sigma_d**2
        return (t - r) * (t**2 + s2) / (s2 + t * r)

    def time_grid(self, num_steps: int, T_max: float, T_min: float) -> Tensor:
        """The Karras grid: equally spaced in t^(1/rho)."""
        roots = torch.linspace(T_max ** (1 / self.rho), T_min ** (1 / self.rho), num_steps + 1, dtype=torch.float64)
        return _pin_ends(roots**self.rho, T_max, T_min)

    def final_state(self, x: Tensor, T_min: float) -> Tensor:
        return x * math.sqrt(T_min**2 + self.sigma_d**2)

    def weight_tangent(self, t: Tensor) -> Tensor:
        return _noise_ratio(self, t)


class VP_SDE(Transport):
    """Variance preserving: sigma/alpha = b(t) = sqrt(expm1(beta_d t²/2 + beta_min t)), the network predicts z."""

    def __init__(
        self,
        beta_min: float = 0.1,
        beta_d: float = 19.9,
        epsilon_t: float = 1e-5,
        T: int = 1000,
        sigma_d: float = 1.0,
        **guidance: float,
    ) -> None:
        super().__init__(1.0, epsilon_t, sigma_d, **guidance)
        self.beta_min, self.beta_d, self.epsilon_t, self.T = beta_min, beta_d, epsilon_t, T

    def _log_ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(q, q') with b² = expm1(q)."""
        return self.beta_d * t**2 / 2 + self.beta_min * t, self.beta_d * t + self.beta_min

    def interpolant(self, t: Tensor) -> PathCoefficients:
        q, d_q = self._log_ratio(t)
        alpha, sigma = torch.exp(-q / 2), torch.sqrt(-torch.expm1(-q))
        return PathCoefficients(alpha, sigma, -alpha * d_q / 2, alpha**2 * d_q / (2 * sigma))

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(zero, one, zero, zero)

    def c_noise(self, t: Tensor) -> Tensor:
        return (self.T - 1) * t

    def time_from_normal(self, n: Tensor) -> Tensor:
        return self.T_min + (self.T_max - self.T_min) * torch.special.ndtr(n)

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        q_t, d_q = self._log_ratio(t)
        b_t, b_r = torch.sqrt(torch.expm1(q_t)), torch.sqrt(torch.expm1(self._log_ratio(r)[0]))
        return (b_t - b_r) * 2 * b_t / (d_q * torch.exp(q_t))


class VE_SDE(Transport):
    """Variance exploding: x_t = x + t z, the network predicts -z."""

    def __init__(self, sigma_min: float = 0.02, sigma_max: float = 100.0, sigma_d: float = 1.0, **guidance: float) -> None:
        super().__init__(sigma_max, sigma_min, sigma_d, **guidance)
        if not sigma_min > 0:
            raise ValueError(f"VE_SDE needs sigma_min > 0, got {sigma_min}")

    def interpolant(self, t: Tensor) -> PathCoefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PathCoefficients(one, t, zero, one)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(zero, -one, zero, zero)

    def c_noise(self, t: Tensor) -> Tensor:
        return torch.log(t / 2)

    def time_from_normal(self, n: Tensor) -> Tensor:
        return self.T_min * (self.T_max / self.T_min) ** torch.special.ndtr(n)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), t - r

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        return t - r

    def time_grid(self, num_steps: int, T_max: float, T_min: float) -> Tensor:
        """The geometric grid."""
        logs = torch.linspace(math.log(T_max), math.log(T_min), num_steps + 1, dtype=torch.float64)
        return _pin_ends(torch.exp(logs), T_max, T_min)

    def weight_tangent(self, t: Tensor) -> Tensor:
        return _noise_ratio(self, t)


def _noise_ratio(transport: Transport, t: Tensor) -> Tensor:
    """sigma / (alpha sigma_d): what tan(t) is for TrigFlow, for transports whose time is a noise level."""
    at = transport.interpolant(t)
    return at.sigma / (at.alpha * transport.sigma_d)


def _pin_ends(grid: Tensor, T_max: float, T_min: float) -> Tensor:
    """Undo the rounding of the grid's two ends."""
    grid[0], grid[-1] = T_max, T_min
    return grid
