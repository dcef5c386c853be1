"""What the derivative costs and how exact it is: attention's tangent by each form, and dF/dt in half precision."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tim.benchmarks.measure import Results, conditions, peak_memory, reset_peak_memory, timed
from tim.checkpoint.adapters import load_weights
from tim.checkpoint.weights import Weights
from tim.config import Config
from tim.models.attention import CrossAttention, SelfAttention
from tim.models.attention_tangent import attention_tangent, explicit_tangent
from tim.models.network import build_network, traits_of
from tim.schedulers.derivative import expand_times
from tim.schedulers.target import Drawn
from tim.schedulers.transition import TransitionSchedule


def bench_tangent(device: torch.device, form: str, batch_size: int, heads: int, tokens: int, head_dim: int) -> Results:
    """Time the tangent of self-attention in bfloat16, beside its relative error against the explicit one in float64."""
    g, shape = torch.Generator(device).manual_seed(0), (batch_size, heads, tokens, head_dim)
    inputs = [torch.randn(shape, generator=g, device=device).to(torch.bfloat16) for _ in range(6)]
    q, k, v, dq, dk, dv = inputs
    reset_peak_memory(device)
    seconds, out = timed(lambda: attention_tangent(q, k, v, dq, dk, dv, form=form), device, repeats=10, warmup=3)
    memory = peak_memory(device)
    exact = explicit_tangent(*(u[:1].double() for u in inputs))
    return {
        "tokens": tokens,
        "form": form,
        "batch_size": batch_size,
        "step_seconds": seconds,
        "peak_memory_gib": memory,
        "relative_error": relative_error(out[:1], exact),
    }


class DerivativePrecision:
    """How exact dF/dt is under bfloat16 autocast, of random latents and noise: `error` against jvp in float64.

    Args:
        weights: of the network; None draws every parameter normal with deviation 0.05.
    """

    def __init__(self, config: Config, device: torch.device, batch_size: int, weights: Weights | None = None) -> None:
        torch.manual_seed(0)
        self.network = network = build_network(config.model.network).to(device).requires_grad_(False)
        if weights is None:
            for p in network.parameters():
                p.normal_(std=0.05)
        else:
            load_weights(network, weights, config.model)
        self.transport, self.device = config.model.transport.build(), device
        x, z = (torch.randn(batch_size, *traits_of(network).latent_shape(), device=device) for _ in range(2))
        self.cond, _ = conditions(network, batch_size, device)
        t, r, _ = TransitionSchedule(self.transport).sample_t_and_r(batch_size, torch.float32, device)
        self.inputs = x, z, t, r
        self.exact = self._in_double(partial(self._derivative, "jvp", None))

    def _in_double(self, evaluate: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        self.network.double()
        exact = evaluate([u.double() for u in self.inputs])
        self.network.float()
        return exact

    def error(self, kind: str, dtype: str, form: str | None = None) -> float:
        """Relative error of the derivative by 'dde' or 'jvp' in a dtype, with a form of attention's tangent."""
        use_tangent_form(self.network, form)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return relative_error(self._derivative(kind, dtype, self.inputs), self.exact)

    def two_point_error(self, ratio: float, dtype: str) -> float:
        """Relative error of what a finite step, in a dtype, makes of the diffusion target; against the same step in float64."""
        exact = self._in_double(partial(self._change, ratio, None))
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return relative_error(self._change(ratio, dtype, self.inputs), exact)

    def _change(self, ratio: float, dtype: str | None, inputs: Sequence[Tensor]) -> Tensor:
        schedule = TransitionSchedule(self.transport, derivative_type="two_point", derivative_dtype=dtype)
        x, z, t, r = inputs
        x_t, v_t = self.transport.path(x, z, expand_times(t, x))
        drawn, none = Drawn(x, z, x_t, t, r, 0, self.cond), (0.0, 0.0)
        F_pred, *_ = schedule.student(self.network, self.network, drawn, (x, z), return_zs=False)
        target = schedule.target(self.network, drawn, v_t, (x, z), none, None, F_pred, ratio)
        return target - schedule.diffusion_target(x, z, t, none)

    def _derivative(self, kind: str, dtype: str | None, inputs: Sequence[Tensor]) -> Tensor:
        schedule = TransitionSchedule(self.transport, derivative_type=kind, derivative_dtype=dtype)
        x, z, t, r = inputs
        return schedule.derivative(self.network, x, z, t, r, 0, self.cond)


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|."""
    return ((value.to(exact.dtype) - exact).norm() / exact.norm()).item()


def use_tangent_form(network: nn.Module, form: str | None) -> None:
    """Let a network compute the tangents of its attentions by this form from now on; None leaves the choice to it again."""
    for module in network.modules():
        if isinstance(module, SelfAttention | CrossAttention):
            module.tangent_form = form
