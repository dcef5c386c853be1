"""The training loop: config -> data -> objective -> optimiser -> EMA -> checkpoint."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tim import rng
from tim.config import Config, to_yaml
from tim.data.prefetch import Prefetcher
from tim.models.network import traits_of
from tim.training.bad_samples import ALL_FILES
from tim.training.guards import LATENT, LOSS, MAX_BAD_STEPS, Verdict, take_step
from tim.training.logging import RunLogger
from tim.training.preemption import EXIT_AGAIN
from tim.training.preview import save_preview
from tim.training.resume import CheckpointManager
from tim.training.setup import Run, build_loader, build_run
from tim.training.sharding import clip_gradients, no_sync
from tim.training.tasks import Task


def train(config: Config, project_dir: str | Path, seed: int, task_class: type[Task], dry_run: bool = False) -> None:
    """Train a TiM, continuing where `project_dir` left off.

    Writes config.yaml, log.jsonl, curves.png, samples/ and checkpoints/ under project_dir. Every random number is a
    function of (seed, step, place in the global batch), so the result does not depend on interruptions.

    Args:
        task_class: ClassTask or CaptionTask.
        dry_run: build and check everything, print the summary, write nothing.

    Raises:
        ValueError, FileNotFoundError: for what the user can mend, more unreadable samples than allowed among it.
        RuntimeError: after three steps in a row that cannot be used.
        SystemExit: with code EXIT_AGAIN after a signal or at `training.walltime`, a checkpoint being written.
    """
    project_dir = Path(project_dir)
    run = build_run(config, project_dir, seed, task_class)
    main = run.accelerator.is_main_process
    if main:
        print(summary(run), flush=True)
    if dry_run:
        return
    checkpoints = CheckpointManager(run)
    with checkpoints.preemption:
        start_step, samples_seen = checkpoints.resume()
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
            run_steps(run, checkpoints, logger, start_step, samples_seen)
        finally:
            logger.close()
            checkpoints.close()
            for tracker in run.accelerator.trackers:
                tracker.finish()


def run_steps(run: Run, checkpoints: CheckpointManager, logger: RunLogger, start_step: int, samples_seen: int) -> None:
    """The loop proper, from start_step to max_train_steps."""
    t, accelerator, guard = run.config.training, run.accelerator, checkpoints.guard
    bad_samples = checkpoints.bad_samples
    loader = build_loader(run, start_step, samples_seen)
    batches = Prefetcher(loader, accelerator.device)
    run.model.train()
    for step in range(start_step + 1, t.max_train_steps + 1):
        checkpoints.preemption.begin_step()
        log, seen = {}, []
        for micro in range(t.gradient_accumulation_steps):
            batch = next(batches)
            bad_samples.record(batch)
            last = micro == t.gradient_accumulation_steps - 1
            with nullcontext() if last else no_sync(run.model):
                loss, values, codes = batch_loss(run, batch)
                accelerator.backward(loss / t.gradient_accumulation_steps)
            seen.append(({key: batch[key] for key in ("index", "position")}, codes))
            for key, value in values.items():
                log[key] = log.get(key, 0) + value / t.gradient_accumulation_steps
        grad_norm = clip_gradients(accelerator, run.model, t.max_grad_norm)
        check(run, checkpoints, guard.poll(), samples_seen)  # of the step before: the device is done with it, nothing waits
        skip = guard.judge(grad_norm, loss_scale(accelerator))
        take_step(run.optimizer.optimizer, skip, accelerator.scaler)
        run.optimizer.zero_grad(set_to_none=True)
        run.lr_scheduler.step()
        if run.ema is not None:
            run.ema.update(run.network, skip)
        samples_seen += loader.batch_sampler.samples_per_step
        guard.post(step, grad_norm, seen)
        logger.step(batches.waited(), int(batch["total"][0]))

        too_many, done = False, step == t.max_train_steps
        if step % t.log_steps == 0 or done:
            log["bad_samples"] = log["dropped"].new_tensor(len(bad_samples) * accelerator.num_processes)
            record = mean_over_ranks(accelerator, log)
            too_many = record["bad_samples"] > run.config.data.max_bad_samples
            record |= {"grad_norm": float(grad_norm), "lr": run.lr_scheduler.get_last_lr()[0]}
            verdict = guard.poll()
            record |= {"skipped": verdict.skipped, "spikes": verdict.spikes}
            if accelerator.scaler is not None:
                record["loss_scale"] = accelerator.scaler.get_scale()
            logger.log(step, record)
            if record["dropped"] > 0:
                accelerator.print(
                    f"step {step}: {record['dropped']:.2%} of the samples have non-finite latents, predictions or targets "
                    f"and were left out; see {guard.path.name}"
                )
            check(run, checkpoints, verdict, samples_seen)
        reason = checkpoints.preemption.end_step()
        if reason or done or too_many or step % t.checkpointing_steps == 0 or step in t.checkpoint_list:
            check(run, checkpoints, guard.poll(), samples_seen)
            checkpoints.save(step, samples_seen)
        if t.sample_steps and (step % t.sample_steps == 0 or done) and not reason:
            save_preview(run, step)
        if too_many:
            raise ValueError(
                f"{record['bad_samples']:.0f} samples could not be read, more than data.max_bad_samples="
                f"{run.config.data.max_bad_samples}; stopped at step {step} with a checkpoint. Mend or leave out the files of "
                f"{ALL_FILES}, delete these, and start again"
            )
        if reason and not done:
            checkpoints.saver.wait()
            accelerator.print(f"stopped by {reason} after step {step}; run the same command again to continue")
            raise SystemExit(EXIT_AGAIN)


def check(run: Run, checkpoints: CheckpointManager, verdict: Verdict | None, samples_seen: int) -> None:
    """Report a step that was skipped; at the third in a row save and stop.

    Args:
        verdict: of the last step whose weights are the present ones. samples_seen: up to there.
    """
    if verdict is None or not verdict.problem:
        return
    in_a_row = f" ({verdict.bad_steps} in a row)" if verdict.bad_steps else ""
    run.accelerator.print(f"step {verdict.step}: {verdict.problem}, step skipped{in_a_row}; see {checkpoints.guard.path.name}")
    if verdict.bad_steps >= MAX_BAD_STEPS:
        run.optimizer.zero_grad(set_to_none=True)
        checkpoints.save(verdict.step, samples_seen)
        raise RuntimeError(
            f"{MAX_BAD_STEPS} steps in a row without a finite gradient, stopped at step {verdict.step} with the last good "
            "weights saved; lower training.learning_rate, or use training.mixed_precision=bf16, and run again. "
            f"{checkpoints.guard.path.name} names the samples"
        )


def loss_scale(accelerator: Accelerator) -> Tensor | None:
    """The fp16 loss scale on the device, without waiting for it."""
    if accelerator.scaler is None:
        return None
    return accelerator.scaler.scale(torch.ones((), device=accelerator.device))


def mean_over_ranks(accelerator: Accelerator, values: dict[str, Tensor]) -> dict[str, float]:
    """Mean of each scalar over all processes, in float64 where the device has it."""
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    means = accelerator.reduce(torch.stack([v.to(dtype) for v in values.values()]), reduction="mean")
    return dict(zip(values, means.tolist(), strict=True))


def batch_loss(run: Run, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Total loss of one micro-batch, its detached log values, and codes (B,): LATENT or LOSS where it is not finite, else 0."""
    model, device = run.config.model, run.accelerator.device
    step, positions = int(batch["step"][0]), batch["position"].tolist()
    x = latents(run, batch).to(run.dtype)
    times, drop, z = rng.training_draws(run.seed, step, positions, x.shape[1:])
    cond, uncond = run.task.conditions(batch, drop < run.task.drop_prob)
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
            null_kwargs=uncond,
            time_kwargs={"normal": times, "position": batch["position"], "global_batch_size": int(batch["total"][0])},
        )
    kept = run.schedule.kept
    projection = torch.where(kept.any(), projection, 0 * projection)  # without a sample there is nothing to learn
    log["dropped"] = 1 - kept.float().mean()
    codes = torch.where(torch.isfinite(x).flatten(1).all(1), torch.where(kept, 0, LOSS), LATENT)
    return weighted + model.proj_coeff * projection, log, codes


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
    """REPA features (B, N, z_dim), one for each token of the network: stored ones, or the encoder's; None without REPA."""
    if "features" in batch:
        return batch["features"].to(x.device, non_blocking=True)
    if run.encoder is None:
        return None
    patch = traits_of(run.network).patch_size
    return run.encoder.tokens(batch["image"].to(x.device), [side // patch for side in x.shape[2:]])


def summary(run: Run) -> str:
    """What is about to be trained, in a few lines."""
    t, a = run.config.training, run.accelerator
    parameters = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    return (
        f"network: {parameters / 1e6:.2f}M trained parameters, {t.dtype}, mixed precision {t.mixed_precision}\n"
        f"data: {run.task.summary()}\n"
        f"batch: {run.global_batch_size} = {run.config.data.dataloader.batch_size} x {t.gradient_accumulation_steps} "
        f"accumulation x {a.num_processes} process(es) on {a.device.type}{', weights sharded' if run.sharded else ''}\n"
        f"steps: {t.max_train_steps}, learning rate {run.lr:.3g} ({t.lr_scheduler})"
    )
