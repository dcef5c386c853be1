"""The training loop: config -> data -> objective -> optimiser -> EMA -> checkpoint."""

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from accelerate import Accelerator
from torch import Tensor

from tim import rng
from tim.config import Config, to_yaml
from tim.training.bad_samples import BadSamples
from tim.training.checkpoint import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tim.training.logging import RunLogger, plot_curves
from tim.training.preview import save_preview
from tim.training.setup import Run, build_loader, build_run
from tim.training.tasks import Task

MAX_BAD_STEPS = 3  # steps in a row without a finite gradient before the run stops


def train(config: Config, project_dir: str | Path, seed: int, task_class: type[Task], dry_run: bool = False) -> None:
    """Train a TiM, continuing where `project_dir` left off.

    Writes config.yaml, log.jsonl, curves.png, samples/ and checkpoints/ under project_dir. Every random number is a
    function of (seed, step, place in the global batch), so the result does not depend on interruptions.

    Args:
        task_class: ClassTask or CaptionTask.
        dry_run: build and check everything, print the summary, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, more unreadable samples than allowed among it.
        RuntimeError: after three steps in a row without a finite gradient.
    """
    project_dir = Path(project_dir)
    run = build_run(config, project_dir, seed, task_class)
    main = run.accelerator.is_main_process
    if main:
        print(summary(run), flush=True)
    if dry_run:
        return
    start_step, visits = resume(run)
    max_steps = config.training.max_train_steps
    if start_step >= max_steps:
        if main:
            print(f"{project_dir} has reached step {start_step} of {max_steps}; nothing to do")
        return
    if main:
        project_dir.mkdir(parents=True, exist_ok=True)
        (project_dir / "config.yaml").write_text(to_yaml(config))
    run.accelerator.wait_for_everyone()
    if config.training.tracker not in (None, "none"):
        t = config.training
        run.accelerator.init_trackers(t.tracker_project_name, init_kwargs={t.tracker: t.tracker_kwargs})
    logger = RunLogger(run.accelerator, project_dir, start_step, max_steps)
    try:
        run_steps(run, logger, start_step, visits)
    finally:
        logger.close()
        run.accelerator.end_training()


def run_steps(run: Run, logger: RunLogger, start_step: int, visits: int) -> None:
    """The loop proper, from start_step to max_train_steps."""
    t, accelerator = run.config.training, run.accelerator
    loader = build_loader(run, start_step, visits)
    batches = iter(loader)
    bad_samples = BadSamples(run.project_dir, accelerator.process_index)
    run.model.train()
    bad_steps = 0
    for step in range(start_step + 1, t.max_train_steps + 1):
        waited, log = 0.0, {}
        for micro in range(t.gradient_accumulation_steps):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            bad_samples.record(batch)
            last = micro == t.gradient_accumulation_steps - 1
            with nullcontext() if last else accelerator.no_sync(run.model):
                loss, values = batch_loss(run, batch)
                accelerator.backward(loss / t.gradient_accumulation_steps)
            for key, value in values.items():
                log[key] = log.get(key, 0) + value / t.gradient_accumulation_steps
        grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), t.max_grad_norm)
        finite = math.isfinite(grad_norm)
        if finite or accelerator.scaler is not None:  # the fp16 scaler skips the step itself and lowers its scale
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.lr_scheduler.step()
        if finite and run.ema is not None:
            run.ema.update(run.network)
        visits += loader.batch_sampler.visits_per_step
        logger.step(waited, int(batch["total"][0]))

        bad_steps = 0 if finite or accelerator.scaler is not None else bad_steps + 1
        if bad_steps:
            accelerator.print(f"step {step}: gradient norm is {float(grad_norm)}, step skipped ({bad_steps} in a row)")
        stop = bad_steps >= MAX_BAD_STEPS
        too_many = False
        if step % t.log_steps == 0 or step == t.max_train_steps or stop:
            log["bad_samples"] = log["dropped"].new_tensor(len(bad_samples) * accelerator.num_processes)
            record = mean_over_ranks(accelerator, log)
            too_many = record["bad_samples"] > run.config.data.max_bad_samples
            record |= {"grad_norm": float(grad_norm), "lr": run.lr_scheduler.get_last_lr()[0]}
            logger.log(step, record)
            if record["dropped"] > 0:
                accelerator.print(
                    f"step {step}: {record['dropped']:.2%} of the samples have non-finite latents and were left out"
                )
        if step % t.checkpointing_steps == 0 or step in t.checkpoint_list or step == t.max_train_steps or stop or too_many:
            save(run, step, visits)
        if t.sample_steps and (step % t.sample_steps == 0 or step == t.max_train_steps) and accelerator.is_main_process:
            save_preview(run, step)
        if stop:
            raise RuntimeError(
                f"{MAX_BAD_STEPS} steps in a row without a finite gradient, stopped at step {step} with the last good "
                "weights saved; lower training.learning_rate or use training.mixed_precision=bf16"
            )
        if too_many:
            raise ValueError(
                f"{record['bad_samples']:.0f} samples could not be read, more than data.max_bad_samples="
                f"{run.config.data.max_bad_samples}; stopped at step {step} with a checkpoint. Mend or leave out the files of "
                f"{bad_samples.path.name}, delete it, and start again"
            )


def mean_over_ranks(accelerator: Accelerator, values: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each scalar over all processes, in float64 where the device has it."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    means = accelerator.reduce(torch.stack([v.to(dtype) for v in values.values()]), reduction="mean")
    return dict(zip(values, means.tolist(), strict=True))


def batch_loss(run: Run, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Total loss of one micro-batch and its detached log values."""
    model, device = run.config.model, run.accelerator.device
    step, positions = int(batch["step"][0]), batch["position"].tolist()
    x = latents(run, batch).to(run.dtype)
    times, drop, z = rng.training_draws(run.seed, step, positions, x.shape[1:])
    cond, null = run.task.conditions(batch, drop < run.task.drop_prob)
    z = z.to(device, run.dtype, non_blocking=True)
    with run.accelerator.autocast():
        weighted, projection, log = run.schedule(
            run.model,
            run.ema.network if run.ema else None,
            run.network,
            len(positions),
            x,
            z,
            cond,
            use_dir_loss=model.use_dir_loss,
            h_target=repa_target(run, batch, x),
            null_kwargs=null,
            time_kwargs={"normal": times, "position": batch["position"], "global_batch_size": int(batch["total"][0])},
        )
    log["dropped"] = 1 - torch.isfinite(x).flatten(1).all(1).float().mean()  # the objective left these out
    return weighted + model.proj_coeff * projection, log


@torch.no_grad()
def latents(run: Run, batch: dict[str, Any]) -> Tensor:
    """Clean latents (B, C, h, w): stored ones, encoded images, or the pixels themselves."""
    device = run.accelerator.device
    if "latent" in batch:
        return batch["latent"].to(device, non_blocking=True)
    if run.vae is None:
        return batch["image"].to(device, non_blocking=True)
    noise = None
    if run.vae.is_kl:
        shape = run.vae.latent_shape(*batch["image"].shape[2:])
        noise = rng.normals(run.seed, "posterior", int(batch["step"][0]), batch["position"].tolist(), shape)
    return run.vae.encode(batch["image"].to(device, non_blocking=True), noise)


@torch.no_grad()
def repa_target(run: Run, batch: dict[str, Any], x: Tensor) -> Tensor | None:
    """REPA features (B, N, z_dim): the image resized so that one encoder patch meets one token of the network."""
    if run.encoder is None:
        return None
    size = [run.encoder.patch_size * side // run.network.patch_size for side in x.shape[2:]]
    image = (batch["image"].to(x.device, torch.float32) + 1) / 2
    image = nnf.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    return run.encoder(image)


def resume(run: Run) -> tuple[int, int]:
    """Load the checkpoint that `resume_from_checkpoint` names; returns (step, visits), (0, 0) for a fresh start."""
    wanted, root = run.config.training.resume_from_checkpoint, run.project_dir / "checkpoints"
    if wanted is None:
        if list_checkpoints(root):
            raise ValueError(
                f"{root} holds checkpoints of an earlier run; continue it with training.resume_from_checkpoint=latest "
                "or choose another --project_dir"
            )
        return 0, 0
    path = latest_checkpoint(root) if wanted == "latest" else Path(wanted)
    if path is None:
        return 0, 0
    if not path.is_dir():
        raise FileNotFoundError(f"training.resume_from_checkpoint={wanted!r} is no checkpoint folder")
    ema = run.ema.network if run.ema else None
    state = load_checkpoint(path, run.network, ema, run.optimizer.optimizer, run.accelerator.scaler)
    if state["seed"] != run.seed:
        raise ValueError(f"{path} was trained with --seed {state['seed']}, not {run.seed}")
    run.lr_scheduler.load_state_dict(state["lr_scheduler"])
    run.accelerator.print(f"resuming from {path} at step {state['step']}")
    return state["step"], state["visits"]


def save(run: Run, step: int, visits: int) -> None:
    """Write a checkpoint and the curves on rank 0, then retire old checkpoints."""
    run.accelerator.wait_for_everyone()
    if run.accelerator.is_main_process:
        t, root = run.config.training, run.project_dir / "checkpoints"
        state = {"seed": run.seed, "visits": visits, "lr_scheduler": run.lr_scheduler.state_dict()}
        ema = run.ema.network if run.ema else None
        save_checkpoint(root, step, run.network, ema, run.optimizer.optimizer, state, run.accelerator.scaler)
        prune_checkpoints(root, t.checkpoints_total_limit, t.checkpoint_list)
        plot_curves(run.project_dir / "log.jsonl", run.project_dir / "curves.png")
    run.accelerator.wait_for_everyone()


def summary(run: Run) -> str:
    """What is about to be trained, in a few lines."""
    t, a = run.config.training, run.accelerator
    parameters = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    return (
        f"network: {parameters / 1e6:.2f}M trained parameters, {t.dtype}, mixed precision {t.mixed_precision}\n"
        f"data: {run.task.summary()}\n"
        f"batch: {run.global_batch_size} = {run.config.data.dataloader.batch_size} x {t.gradient_accumulation_steps} "
        f"accumulation x {a.num_processes} process(es) on {a.device.type}\n"
        f"steps: {t.max_train_steps}, learning rate {run.lr:.3g} ({t.lr_scheduler})"
    )
