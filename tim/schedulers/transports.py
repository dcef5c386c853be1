"""The five transports of the paper, whose coefficients and time laws are those of Tab. 7 and 8 (arXiv 2509.04394).

They override the coefficients of `Transport` with closed forms, which are better conditioned in float32; the tests hold the
two equal.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from tim.schedulers.transport import PathCoefficients, PredictionCoefficients, Transport
from tim.typed_yaml import PositiveFloat, PositiveInt

__all__ = ["EDM", "OT_FM", "VE_SDE", "VP_SDE", "PathCoefficients", "PredictionCoefficients", "Transport", "TrigFlow"]


@dataclass(eq=False, kw_only=True)
class OT_FM(Transport):
    """Flow matching along straight paths: x_t = (1-t) x + t z, F* = z - x."""

    P_mean: float = 0.0
    P_std: PositiveFloat = 1.0
    T_max: float = 1.0
    T_min: float = 0.0

    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha = 1 - t, sigma = t."""
        one = torch.ones_like(t)
        return PathCoefficients(1 - t, t, -one, one)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """F* = z - x, the velocity of the straight path: alpha_hat = -1, sigma_hat = 1."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(-one, one, zero, zero)

    def time_from_normal(self, n: Tensor) -> Tensor:
        """The logit-normal law: t = u / (1 + u) with u = exp(P_std n + P_mean)."""
        return torch.sigmoid(self.P_std * n + self.P_mean)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """A = 1, B = r - t: an Euler step, exact at any length when F is the mean velocity over [r, t]."""
        return torch.ones_like(t), r - t

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) = t - r, with which the identity is that of MeanFlow (arXiv 2505.13447)."""
        return t - r

    def renoise_variance(self, t: Tensor, r: Tensor, s_ratio: float) -> Tensor:
        """eta² = rho dt (2r - rho dt): the re-noising of Alg. 2, of first order in dt, made exact at any step size."""
        step = s_ratio * (t - r)
        return torch.minimum((step * (2 * r - step)).clamp(min=0), r**2)

    def initial_scale(self, T_max: float) -> float:
        """1 at any T_max: a run that starts below 1 starts from z itself."""
        return 1.0


@dataclass(eq=False, kw_only=True)
class TrigFlow(Transport):
    """x_t = cos(t) x + sin(t) z, F* = cos(t) z - sin(t) x: TrigFlow (arXiv 2410.11081) with noise of unit variance."""

    P_mean: float = -1.0
    P_std: PositiveFloat = 1.6
    sigma_d: float = 0.5
    T_max: float = 1.57  # short of pi / 2, where tan diverges
    T_min: float = 0.0

    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha = cos t, sigma = sin t."""
        cos, sin = torch.cos(t), torch.sin(t)
        return PathCoefficients(cos, sin, -sin, cos)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """F* = dx_t/dt: alpha_hat = -sin t, sigma_hat = cos t."""
        cos, sin = torch.cos(t), torch.sin(t)
        return PredictionCoefficients(-sin, cos, -cos, -sin)

    def time_from_normal(self, n: Tensor) -> Tensor:
        """t = atan(u / sigma_d) with u = exp(P_std n + P_mean): sigma_d tan t is log-normal."""
        return torch.atan(torch.exp(self.P_std * n + self.P_mean) / self.sigma_d)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """A = cos(t - r), B = -sin(t - r): a rotation by t - r."""
        return torch.cos(t - r), -torch.sin(t - r)

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) = tan(t - r)."""
        return torch.tan(t - r)


@dataclass(eq=False, kw_only=True)
class EDM(Transport):
    """EDM (arXiv 2206.00364), normalised to unit variance: t is the noise level, x_t = (x + t z) / S_t.

    Eq. 37-38 of the paper are this for sigma_d = 1; here they hold for any.
    """

    P_mean: float = -1.2
    P_std: PositiveFloat = 1.2
    sigma_d: float = 0.5
    T_max: float = 80.0
    T_min: float = 0.01
    rho: ClassVar[float] = 7.0  # of the grid: shortens the steps at low noise at the expense of those at high noise

    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha = 1 / S, sigma = t / S with S = sqrt(t² + sigma_d²), so that alpha² sigma_d² + sigma² = 1."""
        s2 = self.sigma_d**2
        S = torch.sqrt(t**2 + s2)
        return PathCoefficients(1 / S, t / S, -t / S**3, s2 / S**3)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """alpha_hat = t / (sigma_d S), sigma_hat = -sigma_d / S: the regression target of EDM's network."""
        s = self.sigma_d
        S = torch.sqrt(t**2 + s**2)
        return PredictionCoefficients(t / (s * S), -s / S, s / S**3, s * t / S**3)

    def c_noise(self, t: Tensor) -> Tensor:
        """ln(t) / 4 (EDM, Tab. 1)."""
        return torch.log(t) / 4

    def time_from_normal(self, n: Tensor) -> Tensor:
        """The log-normal law of noise levels, t = exp(P_std n + P_mean)."""
        return torch.exp(self.P_std * n + self.P_mean)

    def transition(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """A = (sigma_d² + t r) / (S_t S_r), B = sigma_d (t - r) / (S_t S_r)."""
        s2 = self.sigma_d**2
        norm = torch.sqrt(t**2 + s2) * torch.sqrt(r**2 + s2)
        return (s2 + t * r) / norm, self.sigma_d * (t - r) / norm

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) = (t - r) (t² + sigma_d²) / (sigma_d² + t r)."""
        s2 = self.sigma_d**2
        return (t - r) * (t**2 + s2) / (s2 + t * r)

    def time_grid(self, num_steps: int, T_max: float, T_min: float) -> Tensor:
        """The Karras grid (EDM, Eq. 5): equally spaced in t^(1/rho)."""
        # In float64 the ends come back from the two powers with an error of some 1e-14; the caller's values are wanted.
        roots = torch.linspace(T_max ** (1 / self.rho), T_min ** (1 / self.rho), num_steps + 1, dtype=torch.float64)
        return _pin_ends(roots**self.rho, T_max, T_min)

    def final_state(self, x: Tensor, T_min: float) -> Tensor:
        """x = S x_t at T_min: divides out alpha(T_min), which is not 1."""
        return x * math.sqrt(T_min**2 + self.sigma_d**2)

    def weight_tangent(self, t: Tensor) -> Tensor:
        """t / sigma_d, by sigma / (alpha sigma_d): the time itself is a noise level, whose tangent means nothing."""
        at = self.interpolant(t)
        return at.sigma / (at.alpha * self.sigma_d)


@dataclass(eq=False, kw_only=True)
class VP_SDE(Transport):
    """Variance preserving: sigma/alpha = b(t) = sqrt(expm1(beta_d t²/2 + beta_min t)), the network predicts z.

    The noise schedule is that of EDM's Tab. 1. T_min is epsilon_t > 0, since b'(t) diverges at 0.
    """

    beta_min: PositiveFloat = 0.1
    beta_d: PositiveFloat = 19.9
    epsilon_t: PositiveFloat = 1e-5
    T: PositiveInt = 1000
    T_max: float = field(default=1.0, init=False)
    T_min: float = field(init=False)

    def __post_init__(self) -> None:
        self.T_min = self.epsilon_t
        super().__post_init__()

    def _log_ratio(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(q, q') with b² = expm1(q)."""
        return self.beta_d * t**2 / 2 + self.beta_min * t, self.beta_d * t + self.beta_min

    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha = 1 / sqrt(b² + 1), sigma = b / sqrt(b² + 1)."""
        q, d_q = self._log_ratio(t)
        # 1 / sqrt(b² + 1) and b / sqrt(b² + 1) without b, which overflows float32 for large beta; expm1 keeps small q exact.
        alpha, sigma = torch.exp(-q / 2), torch.sqrt(-torch.expm1(-q))
        return PathCoefficients(alpha, sigma, -alpha * d_q / 2, alpha**2 * d_q / (2 * sigma))

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """F* = z."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(zero, one, zero, zero)

    def c_noise(self, t: Tensor) -> Tensor:
        """(T - 1) t, the step among T of the discrete process (EDM, Tab. 1)."""
        return (self.T - 1) * t

    def time_from_normal(self, n: Tensor) -> Tensor:
        """Uniform on [T_min, T_max]: the normal distribution function is uniform on [0, 1]."""
        return self.T_min + (self.T_max - self.T_min) * torch.special.ndtr(n)

    def identity_factor(self, t: Tensor, r: Tensor) -> Tensor:
        """B / (dB/dt) = (b_t - b_r) / b'_t with b' = (beta_d t + beta_min) (b² + 1) / (2 b)."""
        q_t, d_q = self._log_ratio(t)
        b_t, b_r = torch.sqrt(torch.expm1(q_t)), torch.sqrt(torch.expm1(self._log_ratio(r)[0]))
        return (b_t - b_r) * 2 * b_t / (d_q * torch.exp(q_t))


@dataclass(eq=False, kw_only=True)
class VE_SDE(Transport):
    """Variance exploding: x_t = x + t z, the network predicts -z; the noise levels are those of EDM's Tab. 1."""

    sigma_min: PositiveFloat = 0.02
    sigma_max: PositiveFloat = 100.0
    T_max: float = field(init=False)
    T_min: float = field(init=False)

    def __post_init__(self) -> None:
        self.T_max, self.T_min = self.sigma_max, self.sigma_min
        super().__post_init__()
        if not self.sigma_min > 0:
            raise ValueError(f"VE_SDE needs sigma_min > 0, got {self.sigma_min}")

    def interpolant(self, t: Tensor) -> PathCoefficients:
        """alpha = 1, sigma = t."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PathCoefficients(one, t, zero, one)

    def prediction(self, t: Tensor) -> PredictionCoefficients:
        """F* = -z."""
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        return PredictionCoefficients(zero, -one, zero, zero)

    def c_noise(self, t: Tensor) -> Tensor:
        """ln(t / 2) (EDM, Tab. 1)."""
        return torch.log(t / 2)

    def time_from_normal(self, n: Tensor) -> Tensor:
        """Log-uniform on [T_min, T_max]."""
        return self.T_min * (self.T_max / self.T_min) ** torch.special.ndtr(n)

    # No closed forms of A = 1, B = t - r and B / (dB/dt) = t - r: with coefficients 0 and 1 the derived ones do not round.

    def time_grid(self, num_steps: int, T_max: float, T_min: float) -> Tensor:
        """Equally spaced in ln(t): the geometric grid (EDM, Tab. 1)."""
        logs = torch.linspace(math.log(T_max), math.log(T_min), num_steps + 1, dtype=torch.float64)
        return _pin_ends(torch.exp(logs), T_max, T_min)

    def weight_tangent(self, t: Tensor) -> Tensor:
        """t / sigma_d: the time itself is a noise level, whose tangent means nothing."""
        return t / self.sigma_d


def _pin_ends(grid: Tensor, T_max: float, T_min: float) -> Tensor:
    """Undo the rounding of the grid's two ends."""
    grid[0], grid[-1] = T_max, T_min
    return grid
