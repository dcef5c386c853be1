"""What the derivative costs and how exact it is: attention's tangent by each form, and dF/dt in half precision."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from tim.benchmarks.measure import Results, conditions, peak_memory, reset_peak_memory, timed
from tim.checkpoint.weights import Weights
from tim.config import Config
from tim.models import attention
from tim.models.attention_tangent import attention_tangent
from tim.models.loading import load_strict
from tim.models.network import build_network, traits_of
from tim.schedulers.transition import TransitionSchedule


def bench_tangent(device: torch.device, form: str, batch_size: int, heads: int, tokens: int, head_dim: int) -> Results:
    """Time the tangent of self-attention in bfloat16, beside its relative error against the explicit one in float64."""
    g = torch.Generator(device).manual_seed(0)
    inputs = [
        torch.randn(batch_size, heads, tokens, head_dim, generator=g, device=device).to(torch.bfloat16) for _ in range(6)
    ]
    reset_peak_memory(device)
    seconds, out = timed(lambda: attention_tangent(*inputs, form=form), device, repeats=10, warmup=3)
    memory = peak_memory(device)
    exact = attention_tangent(*(u[:1].double() for u in inputs), form="explicit")
    return {
        "tokens": tokens,
        "form": form,
        "batch_size": batch_size,
        "step_seconds": seconds,
        "peak_memory_gib": memory,
        "relative_error": relative_error(out[:1], exact),
    }


def derivative_errors(
    config: Config, device: torch.device, batch_size: int, forms: Sequence[str] = (), weights: Weights | None = None
) -> Results:
    """Relative errors of dF/dt under bfloat16 autocast, against jvp in float64, of random latents and noise.

    Args:
        forms: of attention's tangent, to tell apart besides the one that the device would get.
        weights: of the network; None draws every parameter normal with deviation 0.05.

    Returns:
        By the derivative's type and dtype, and form.
    """
    torch.manual_seed(0)
    network = build_network(config.model.network).to(device).requires_grad_(False)
    if weights is None:
        for p in network.parameters():
            p.normal_(std=0.05)
    else:
        load_strict(network, weights.read(), weights.source)
    transport = config.model.transport.build()
    x, z = (torch.randn(batch_size, *traits_of(network).latent_shape(), device=device) for _ in range(2))
    cond, _ = conditions(network, batch_size, device)
    t, r, _ = TransitionSchedule(transport).sample_t_and_r(batch_size, torch.float32, device)

    def derivative(kind: str, dtype: str | None, wide: bool = False) -> Tensor:
        schedule = TransitionSchedule(transport, derivative_type=kind, derivative_dtype=dtype)
        model = network.double() if wide else network.float()
        clean, noise, start, end = (v.double() if wide else v for v in (x, z, t, r))
        return schedule.derivative(model, clean, noise, start, end, 0, cond).double()

    exact, errors = derivative("jvp", None, wide=True), {}
    cases = [(kind, dtype, None) for kind in ("dde", "jvp") for dtype in ("float32", "bfloat16")]
    for kind, dtype, form in [*cases, *(("jvp", "bfloat16", form) for form in forms)]:
        name = " ".join(filter(None, (kind, dtype, form)))
        use_tangent_form(form)
        try:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                errors[name] = relative_error(derivative(kind, dtype), exact)
        finally:
            use_tangent_form(None)
    return {**errors}


def relative_error(value: Tensor, exact: Tensor) -> float:
    """|value - exact| / |exact|."""
    return ((value.to(exact.dtype) - exact).norm() / exact.norm()).item()


def use_tangent_form(form: str | None) -> None:
    """Let networks compute attention's tangent by this form from now on; None leaves the choice to them again."""
    attention.attention_tangent = attention_tangent if form is None else partial(attention_tangent, form=form)
