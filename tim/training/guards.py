"""Steps that must not count: not finite, or with a gradient far above the usual. Decided on the device.

Nothing here waits for the device inside a step. The decision reaches optimiser and EMA as a tensor; its copy on the host
is read in the step after, when the device has long finished with it.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tim.data.batch import Batch
from tim.files import append_json_lines
from tim.training.logging import drop_later_records, rank_file

MAX_BAD_STEPS = 3  # steps in a row that cannot be used before the run stops
NORMS, FEWEST_NORMS = 64, 16  # window of the running median, and how full it must be to judge by
LATENT, LOSS = 1, 2  # codes of a sample: its latent, or its prediction or target, is not finite
CAUSES = {LATENT: "latent", LOSS: "prediction or target"}


class Verdict(NamedTuple):
    """What the device found in one step, read on the host.

    Attributes:
        bad_steps: steps in a row that could not be used, this one included.
        problem: why this step was skipped, empty when it was not.
    """

    step: int
    bad_steps: int
    problem: str


class NonFiniteGuard:
    """Judges every step by its gradient norm and writes down the samples behind a problem.

    A step is skipped when its norm is not finite; when it is exactly 0, which is what remains if no sample of the global
    batch is finite; or when it exceeds `spike` times the median of the last 64 finite norms (16 at least). Under fp16
    an overflow is the scaler's business and counts as bad only once the loss scale has fallen to 1.

    Args:
        device: where the norm lives.
        folder: of the run; nonfinite.jsonl is written there (nonfinite-rank1.jsonl by rank 1 and so on).
        rank: of this process.
        start_step: lines of later steps, of an attempt that was cut off, go.
        spike: `training.max_grad_norm_spike`; None skips no finite step.

    Attributes:
        skipped, spikes: totals of the run, as of the last `poll`.
    """

    def __init__(self, device: torch.device, folder: Path, rank: int, start_step: int = 0, spike: float | None = None) -> None:
        self.device, self.spike = device, spike
        self.counts = torch.zeros(3, dtype=torch.int64, device=device)  # bad in a row, skipped, spikes
        self.norms = torch.full((NORMS,), math.nan, device=device)
        self.skipped = self.spikes = 0
        # A step, its micro-batches, and its numbers on their way to the host: they are there once the event has happened.
        self.posted: tuple[int, list[Batch], Tensor, torch.cuda.Event | None] | None = None
        self.path = rank_file(folder, "nonfinite", rank)
        known = drop_later_records(self.path, start_step)
        self.written = {(record["index"], record.get("cause")) for record in known if "index" in record}

    def judge(self, grad_norm: Tensor, loss_scale: Tensor | None = None) -> Tensor:
        """Whether to skip the step, 0-dim float32 on the device: 1 to skip, 0 to take it.

        Args:
            grad_norm: 0-dim, before clipping, the same on all ranks.
            loss_scale: 0-dim, of the fp16 scaler.
        """
        norm = grad_norm.detach()
        finite = torch.isfinite(norm)
        bad = counted = ~finite | (norm == 0)
        if loss_scale is not None:
            counted = (~finite & (loss_scale <= 1)) | (norm == 0)
        spike = torch.zeros_like(bad)
        # torch.where and no `if` on a number: whatever asked the device for one would wait for the whole step.
        if self.spike is not None:
            usual = torch.nanmedian(self.norms, dim=0).values  # with dim: without, it waits for the device
            enough = torch.isfinite(self.norms).sum() >= FEWEST_NORMS
            spike = finite & enough & (norm > self.spike * usual)
            moved = torch.cat([self.norms[1:], norm.to(self.norms.dtype)[None]])
            self.norms = torch.where(finite, moved, self.norms)
        skip = bad | spike
        in_a_row = torch.where(counted, self.counts[0] + 1, 0)
        self.counts = torch.stack([in_a_row, self.counts[1] + skip, self.counts[2] + spike])
        return skip.float()

    def post(self, step: int, grad_norm: Tensor, micro_batches: list[tuple[Batch, Tensor]]) -> None:
        """Send the numbers of a finished step to the host, without waiting for them.

        Args:
            micro_batches: of this rank, (`index` and `position` of a batch, codes (B,) of its samples on the device).
        """
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        parts = [self.counts, grad_norm.detach().reshape(1), *(codes for _, codes in micro_batches)]
        packed = torch.cat([part.to(wide) for part in parts])  # one copy instead of many; float64 holds every count exactly
        numbers, arrived = packed, None
        if self.device.type == "cuda":
            # Page-locked memory: only there is a copy asynchronous.
            numbers = torch.empty(packed.shape, dtype=wide, pin_memory=True).copy_(packed, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.posted = step, [batch for batch, _ in micro_batches], numbers, arrived

    def poll(self) -> Verdict | None:
        """The numbers of the step posted last, once; waits for that step alone. Writes nonfinite.jsonl."""
        if self.posted is None:
            return None
        (step, batches, numbers, arrived), self.posted = self.posted, None
        if arrived is not None:
            arrived.synchronize()
        bad_steps, skipped, spikes, norm, *codes = numbers.tolist()
        problem = ""
        if skipped > self.skipped:
            problem = f"gradient norm {norm:.4g}" + (" is a spike" if spikes > self.spikes else "")
        self.skipped, self.spikes = int(skipped), int(spikes)
        if problem or any(codes):
            self._write(step, batches, problem, codes)
        return Verdict(step, int(bad_steps), problem)

    def _write(self, step: int, batches: list[Batch], problem: str, codes: list[float]) -> None:
        """A line for each new non-finite sample; one with all samples of this rank for a skipped step."""
        indices = torch.cat([batch["index"] for batch in batches]).tolist()
        positions = torch.cat([batch["position"] for batch in batches]).tolist()
        lines: list[dict[str, Any]] = []
        for index, position, code in zip(indices, positions, codes, strict=True):
            cause = CAUSES.get(int(code))
            if cause and (index, cause) not in self.written:
                self.written.add((index, cause))
                lines.append({"step": step, "index": index, "position": position, "cause": cause})
        if problem:
            lines.append({"step": step, "cause": problem, "indices": indices})
        append_json_lines(self.path, lines)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to judge alike, JSON values."""
        return {"counts": self.counts.tolist(), "norms": [n for n in self.norms.tolist() if math.isfinite(n)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`. A run that stopped for its bad steps starts to count anew."""
        in_a_row, self.skipped, self.spikes = state["counts"]
        in_a_row = 0 if in_a_row >= MAX_BAD_STEPS else in_a_row
        self.counts = torch.tensor([in_a_row, self.skipped, self.spikes], device=self.device)
        padded = [math.nan] * (NORMS - len(state["norms"])) + state["norms"]
        self.norms = torch.tensor(padded, device=self.device)


def clips(optimizer: torch.optim.Optimizer) -> bool:
    """Whether gradients are clipped in the step itself: by fused optimisers on a GPU, whose kernels divide in float32."""
    weight = optimizer.param_groups[0]["params"][0]
    return _is_fused(optimizer) and weight.device.type == "cuda" and weight.dtype == torch.float32


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def take_step(
    optimizer: torch.optim.Optimizer,
    skip: Tensor,
    scaler: torch.amp.GradScaler | None = None,
    divisor: Tensor | None = None,
) -> None:
    """One optimiser step unless `skip` is 1, in which case weights and moments stay as they are.

    A fused optimiser reads `skip` on the device, by the mechanism that gradient scalers use. Any other has to be told by
    the host, which waits for the device once per step.

    Args:
        optimizer: the bare one; its gradients are unscaled.
        skip: see `NonFiniteGuard.judge`.
        scaler: has unscaled the gradients, and adapts its scale now.
        divisor: 0-dim float32, what the gradients are divided by; for fused optimisers alone.
    """
    if _is_fused(optimizer):
        fused: Any = optimizer  # only fused ones have these attributes, while they step
        fused.grad_scale, fused.found_inf = divisor, skip
        try:
            fused.step()
        finally:
            del fused.grad_scale, fused.found_inf
    elif not bool(skip):
        optimizer.step()
    if scaler is not None:
        scaler.update()
