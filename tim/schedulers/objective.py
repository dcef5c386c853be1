"""What the trainer and the benchmarks need of an objective, so that another can be plugged in by its import path."""

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from tim.schedulers.transport import Transport


class Losses(NamedTuple):
    """One evaluation of an objective.

    Attributes:
        weighted: the loss of the times and states, a scalar with gradient.
        projection: the REPA term, a scalar with gradient; 0 without it.
        log: detached scalars by name.
        kept: (B,) bool, the samples that entered the loss: their input, prediction and target are finite.
    """

    weighted: Tensor
    projection: Tensor
    log: dict[str, Tensor]
    kept: Tensor


class Objective(Protocol):
    """A training objective; the published one is `tim.schedulers.transition.TransitionSchedule`.

    `model.transition_loss.target` in a config names its class, and the other keys there are keywords of the constructor,
    whose first argument is the transport. Inheriting from `TransitionSchedule` and changing one step is the short way.

    Attributes:
        transport: path, closed forms and model guidance (`enhance_target`).
        derivative_type: 'jvp' when forward-mode AD runs through the network, which compiled blocks then leave eager.
        always_run_derivative: set by the trainer when processes share sharded weights: each must then evaluate the network
            as often as the others, whatever times it drew.
    """

    transport: Transport
    derivative_type: str
    always_run_derivative: bool

    def evaluate(
        self,
        model: nn.Module,
        ema_model: nn.Module | None,
        unwrapped_model: nn.Module,
        batch_size: int,
        x: Tensor,
        z: Tensor,
        model_kwargs: dict[str, Any],
        use_dir_loss: bool = False,
        h_target: Tensor | None = None,
        ema_kwargs: dict[str, Any] | None = None,
        null_kwargs: dict[str, Any] | None = None,
        time_kwargs: dict[str, Any] | None = None,
        guidance_kwargs: dict[str, Any] | None = None,
        step: int | None = None,
        max_steps: int | None = None,
    ) -> Losses:
        """The losses of one micro-batch.

        Args:
            model: the network that is trained, possibly wrapped (DDP); unwrapped_model: the bare one.
            ema_model: its moving average, for targets that need one.
            x, z: clean latents and noise (B, C, H, W).
            model_kwargs, null_kwargs: conditional and unconditional keywords of the network; ema_kwargs: conditional
                ones of the moving average, model_kwargs when None.
            use_dir_loss: add the mean over positions of 1 - cos along the channels.
            h_target: REPA features (B, N, z_dim).
            time_kwargs: what times are made from, so that they do not depend on how the batch is split: `normal` (B, 2),
                `position` (B,) in the global batch, `global_batch_size`.
            guidance_kwargs: for networks that take guidance as an input: `uniform` (B, 4) draws that it is made from, and
                `dropped` (B,) bool, the samples without their condition.
            step, max_steps: of training, the first step being 0, for schedules of the objective's own; None when there is
                no training, which is taken for its end.
        """
        ...
