"""Ways to compute a training step, by the trainer's own loop: which derivative, in which precision, compiled or not."""

import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

from tim.benchmarks.derivative import use_tangent_form
from tim.benchmarks.measure import Results, machine
from tim.benchmarks.training import random_run, watch
from tim.config import Config
from tim.schedulers.transition import TransitionSchedule
from tim.training.compilation import compile_blocks
from tim.training.setup import Run


@dataclass(frozen=True)
class Variant:
    """How steps of a run are computed from now on.

    Args:
        derivative: 'dde', 'jvp', or 'none', which trains all samples with r = t (flow matching).
        dtype: of the derivative's passes, see `TransitionSchedule`.
        form: of attention's tangent, which only jvp has; None leaves the choice to the network.
        compiled: whether blocks run compiled.
    """

    derivative: str
    dtype: str | None = None
    form: str | None = None
    compiled: bool = False

    def __str__(self) -> str:
        name = "flow matching" if self.derivative == "none" else self.derivative
        return " ".join(filter(None, (name, self.form, self.dtype, "compiled" if self.compiled else None)))

    def apply(self, run: Run) -> None:
        """Change the run, whose blocks are compiled at the first compiled variant. Call `end_variants` after the last.

        Raises:
            ValueError: for an objective of one's own, which may know no derivative.
        """
        s, t = run.schedule, run.config.training
        if not isinstance(s, TransitionSchedule):
            raise ValueError(f"model.transition_loss.target={run.config.model.objective.target!r} has no variants to compare")
        configured = run.config.model.build_objective()
        ratios = (1.0, 0.0) if self.derivative == "none" else (configured.diffusion_ratio, configured.consistency_ratio)
        s.diffusion_ratio, s.consistency_ratio = ratios
        s.derivative_type = "dde" if self.derivative == "none" else self.derivative
        s.derivative_dtype = self.dtype
        use_tangent_form(run.network, self.form)
        if self.compiled and not t.compile:
            compile_blocks(run.network)
            t.compile = True
        torch.compiler.set_stance("default" if self.compiled else "force_eager")


def end_variants() -> None:
    """Let other runs of this process compile again."""
    torch.compiler.set_stance("default")


def cpu_seconds() -> float:
    """Processor time of this process so far, and of those that it ran, such as compilers."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def bench_ratio(config: Config, batch_size: int, rounds: int, warmup: int, compiled: bool) -> Results:
    """Steps by dde and by jvp in turn within one run, by processor time, which other programs on the machine change least.

    Args:
        rounds: steps of each that count, after `warmup` others; every round begins with another.
        compiled: also with compiled blocks.

    Returns:
        Median processor seconds of each, and its ratio to dde run eagerly: the median over rounds, with the quartiles. For
        those that are compiled also the seconds of warm-up, most of which go to the compiler.
    """
    if rounds < 2:
        raise ValueError(f"--steps must be >= 2 rounds to compare, got {rounds}")
    first = Variant("dde")
    variants = [Variant(kind, compiled=done) for done in ([False, True] if compiled else [False]) for kind in ("dde", "jvp")]
    order = [variants[(place + k) % len(variants)] for k in range(warmup + rounds) for place in range(len(variants))]
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    with tempfile.TemporaryDirectory() as folder:
        run = random_run(config, batch_size, Path(folder))
        began = cpu_seconds()

        def turn() -> None:
            nonlocal began
            done = sum(map(len, seconds.values()))
            seconds[order[done]].append(cpu_seconds() - began)
            if done + 1 < len(order):
                order[done + 1].apply(run)
            began = cpu_seconds()

        try:
            order[0].apply(run)
            watch(run, len(order), after_step=turn)
        finally:
            end_variants()
    results: Results = {"what": "ratio", **machine(run.accelerator.device), "batch_size": batch_size, "rounds": rounds}
    for variant, spent in seconds.items():
        counted = spent[warmup:]
        low, middle, high = quantiles((a / b for a, b in zip(counted, seconds[first][warmup:], strict=True)), n=4)
        results |= {f"{variant}, CPU seconds": median(counted), f"{variant}, ratio": middle}
        results[f"{variant}, quartiles"] = f"{low:.3f} - {high:.3f}"
        if variant.compiled:
            results[f"{variant}, warm-up"] = sum(spent[:warmup])
    return results
