"""The training loop: config -> data -> objective -> optimiser -> EMA -> checkpoint."""

import logging
import shlex
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from tim import rng
from tim.checkpoint.adapters import LORA_FILE, write_lora
from tim.config import Config
from tim.data.batch import Batch
from tim.data.prefetch import Prefetcher
from tim.models.network import traits_of
from tim.resumable import first_process, locked
from tim.training.bad_samples import ALL_FILES, BadSamples
from tim.training.guards import LATENT, LOSS, MAX_BAD_STEPS, Verdict, clips, take_step
from tim.training.history import keep_config
from tim.training.logging import RunLogger
from tim.training.preemption import EXIT_AGAIN
from tim.training.preview import save_preview
from tim.training.resume import CheckpointManager
from tim.training.setup import Run, build_loader, build_run
from tim.training.sharding import clip_gradients, set_gradient_sync
from tim.training.tasks import Task
from tim.training.trackers import start_trackers

logger = logging.getLogger(__name__)
EARLY_PREVIEW = 50  # step whose preview, beside that of the start, shows soon whether anything is learned


def train(
    config: Config,
    project_dir: str | Path,
    seed: int,
    task_class: type[Task],
    dry_run: bool = False,
    allow_changes: bool = False,
) -> None:
    """Train a TiM, continuing where `project_dir` left off.

    Writes config.yaml, log.jsonl, curves.png, samples/ and checkpoints/ under project_dir. Every random number is a
    function of (seed, step, place in the global batch), so the result does not depend on interruptions.

    Args:
        task_class: ClassTask or CaptionTask.
        dry_run: build and check everything, print the summary, write nothing.
        allow_changes: continue with another dataset, network, transport or optimiser than before.

    Raises:
        ValueError, OSError: for what the user can mend, more unreadable samples than allowed and full disks among it.
        RuntimeError: after three steps in a row that cannot be used.
        SystemExit: with code EXIT_AGAIN after a signal or at `training.walltime`, a checkpoint being written.
    """
    project_dir, t = Path(project_dir), config.training
    run = build_run(config, project_dir, seed, task_class)
    accelerator = run.accelerator
    accelerator.print(summary(run), flush=True)
    if dry_run:
        return
    checkpoints, state = CheckpointManager(run, allow_changes), PartialState()
    with locked(project_dir, state), checkpoints.preemption:
        start_step, samples_seen = checkpoints.resume()
        if start_step >= t.max_train_steps:
            logger.info(f"{project_dir} has reached step {start_step} of {t.max_train_steps}; nothing to do")
            return
        first_process(state, lambda: keep_config(project_dir, config, start_step))
        accelerator.wait_for_everyone()
        start_trackers(accelerator, config, project_dir, seed)
        run_log = RunLogger(accelerator, project_dir, start_step, t.max_train_steps)
        try:
            run_steps(run, checkpoints, run_log, start_step, samples_seen)
        finally:
            run_log.bar.close()
            checkpoints.close()
            for tracker in accelerator.trackers:
                tracker.finish()
    if run.base is not None:
        save_adapters(run)
    accelerator.print(closing_line(run), flush=True)


def save_adapters(run: Run) -> None:
    """Write the adapters of a finished run for `load_lora_weights`."""
    path = run.project_dir / LORA_FILE
    try:
        write_lora(run.ema.network if run.ema else run.network, path)
    except ValueError as error:  # parts that were trained whole
        logger.info(str(error))
    else:
        logger.info(f"adapters for load_lora_weights of pipelines in {path}")


def run_steps(run: Run, checkpoints: CheckpointManager, run_log: RunLogger, start_step: int, samples_seen: int) -> None:
    """The loop with its data, from start_step to max_train_steps."""
    loader, samples_per_step = build_loader(run, start_step, samples_seen)
    with closing(Prefetcher(loader, run.accelerator.device, partial(add_draws, run))) as batches:
        _run_steps(run, checkpoints, run_log, batches, start_step, samples_seen, samples_per_step)


def _run_steps(
    run: Run,
    checkpoints: CheckpointManager,
    run_log: RunLogger,
    batches: Prefetcher,
    start_step: int,
    samples_seen: int,
    samples_per_step: int,
) -> None:
    """The loop proper."""
    t, accelerator, guard = run.config.training, run.accelerator, checkpoints.guard
    run.model.train()
    if start_step == 0 and t.sample_steps:
        save_preview(run, 0)
    for step in range(start_step + 1, t.max_train_steps + 1):
        checkpoints.preemption.begin_step()
        log, judged = accumulate_gradients(run, batches, checkpoints.bad_samples)
        grad_norm, divisor = clip_gradients(accelerator, run.model, t.max_grad_norm, clips(run.optimizer.optimizer))
        check(run, checkpoints, guard.poll(), samples_seen)  # of the step before: the device is done with it, nothing waits
        # What the scaler multiplied losses by, without asking it: get_scale() would wait for the device.
        scale = accelerator.scaler and accelerator.scaler.scale(torch.ones((), device=accelerator.device))
        skip = guard.judge(grad_norm, scale)
        take_step(run.optimizer.optimizer, skip, accelerator.scaler, divisor)
        run.optimizer.zero_grad(set_to_none=True)
        run.lr_scheduler.step()  # for skipped steps too, so that the schedule depends on the step alone
        if run.ema is not None:
            run.ema.update(run.network, skip)
        samples_seen += samples_per_step
        guard.post(step, grad_norm, judged)
        run_log.step(batches.waited(), int(judged[0][0]["total"][0]))

        bad_samples, done = 0.0, step == t.max_train_steps
        if step % t.log_steps == 0 or done:
            verdict = guard.poll()  # of this step: the device is waited for
            bad_samples = log_step(run, checkpoints, run_log, step, log, grad_norm)["bad_samples"]
            check(run, checkpoints, verdict, samples_seen)
        too_many = bad_samples > run.config.data.max_bad_samples
        reason = checkpoints.preemption.end_step()
        if reason or done or too_many or step % t.checkpointing_steps == 0 or step in t.checkpoint_list:
            check(run, checkpoints, guard.poll(), samples_seen)
            checkpoints.save(step, samples_seen)
        if t.sample_steps and (step % t.sample_steps == 0 or step == EARLY_PREVIEW or done) and not reason:
            save_preview(run, step)
        if too_many:
            raise ValueError(
                f"{bad_samples:.0f} samples could not be read, more than data.max_bad_samples="
                f"{run.config.data.max_bad_samples}; stopped at step {step} with a checkpoint. Mend the files of {ALL_FILES} "
                "or leave them out, delete these, and start again (with --allow-changes when samples were left out)"
            )
        if reason and not done:
            checkpoints.close()
            logger.info(f"stopped by {reason} after step {step}; run the same command again to continue")
            raise SystemExit(EXIT_AGAIN)


def accumulate_gradients(
    run: Run, batches: Iterator[Batch], bad_samples: BadSamples
) -> tuple[dict[str, Tensor], list[tuple[Batch, Tensor]]]:
    """The backward passes of a step, over its micro-batches.

    Returns:
        means of the log values, and for every micro-batch where its samples are from, with their codes of `batch_loss`.
    """
    count = run.config.training.gradient_accumulation_steps
    log: dict[str, Tensor] = {}
    judged: list[tuple[Batch, Tensor]] = []
    for micro in range(count):
        batch = next(batches)
        bad_samples.record(batch)
        set_gradient_sync(run.model, micro == count - 1)
        loss, values, codes = batch_loss(run, batch)
        run.accelerator.backward(loss / count)
        judged.append(({"index": batch["index"], "position": batch["position"], "total": batch["total"]}, codes))
        for key, value in values.items():
            log[key] = log.get(key, 0) + value / count
    return log, judged


def log_step(
    run: Run, checkpoints: CheckpointManager, run_log: RunLogger, step: int, log: dict[str, Tensor], grad_norm: Tensor
) -> dict[str, float]:
    """Write the record of a step, means over all processes, and return it. Collective, and waits for the device."""
    accelerator, guard = run.accelerator, checkpoints.guard
    bad_samples = len(checkpoints.bad_samples) * accelerator.num_processes  # the mean of which is the number on all processes
    log = {**log, "bad_samples": log["dropped"].new_tensor(bad_samples)}
    wide = torch.float32 if accelerator.device.type == "mps" else torch.float64
    means = accelerator.reduce(torch.stack([v.to(wide) for v in log.values()]), reduction="mean")
    record = dict(zip(log, means.tolist(), strict=True))
    # The norm is the same in every process, and the guard's totals are those of the run.
    record |= {"grad_norm": float(grad_norm), "lr": float(run.lr_scheduler.get_last_lr()[0])}
    record |= {"skipped": guard.skipped, "spikes": guard.spikes}
    if accelerator.scaler is not None:
        record["loss_scale"] = accelerator.scaler.get_scale()
    run_log.log(step, record)
    if record["dropped"] > 0:
        logger.info(
            f"step {step}: {record['dropped']:.2%} of the samples have non-finite latents, predictions or targets "
            f"and were left out; see {guard.path.name}"
        )
    return record


def check(run: Run, checkpoints: CheckpointManager, verdict: Verdict | None, samples_seen: int) -> None:
    """Report a step that was skipped; at the third in a row save and stop.

    Args:
        verdict: of the last step whose weights are the present ones. samples_seen: up to there.
    """
    if verdict is None or not verdict.problem:
        return
    in_a_row = f" ({verdict.bad_steps} in a row)" if verdict.bad_steps else ""
    file = checkpoints.guard.path.name
    logger.info(f"step {verdict.step}: {verdict.problem}, step skipped{in_a_row}; see {file}")
    if verdict.bad_steps >= MAX_BAD_STEPS:
        run.optimizer.zero_grad(set_to_none=True)  # of the step that has begun since, which does not count
        checkpoints.save(verdict.step, samples_seen)
        raise RuntimeError(
            f"{MAX_BAD_STEPS} steps in a row without a finite gradient, stopped at step {verdict.step} with the last good "
            "weights saved; lower training.learning_rate, or use training.mixed_precision=bf16, and run again. "
            f"{file} names the samples"
        )


def add_draws(run: Run, batch: Batch) -> Batch:
    """A batch with its random numbers and conditions (`Batch`), made in the thread that fetches it."""
    step, positions = int(batch["step"][0]), batch["position"].tolist()
    vae = None if "latent" in batch else run.vae
    shape: Sequence[int] = (batch["latent"] if "latent" in batch else batch["image"]).shape[1:]
    if vae is not None:
        shape = vae.latent_shape(*shape[1:])
    times, drop, noise = rng.training_draws(run.seed, step, positions, shape)
    dropped = drop < run.task.drop_prob
    batch = {**run.task.prepare(batch, dropped), "times": times, "dropped": dropped, "noise": noise.to(run.dtype)}
    if vae is not None and vae.is_kl:
        batch["posterior"] = rng.normals(run.seed, "posterior", step, positions, shape)
    if traits_of(run.network).guidance_input:
        batch["guidance"] = rng.uniforms(run.seed, "guidance", step, positions, 4)
    return batch


def batch_loss(run: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Total loss of one micro-batch, its detached log values, and codes (B,): LATENT or LOSS where it is not finite, else 0."""
    model, positions = run.config.model, batch["position"].tolist()
    x = latents(run, batch).to(run.dtype)
    cond, uncond = run.task.conditions(batch)
    guidance = {"uniform": batch["guidance"], "dropped": batch["dropped"]} if "guidance" in batch else None
    with run.accelerator.autocast():
        weighted, projection, log, kept = run.schedule.evaluate(
            run.model,
            run.modules.get("ema"),
            run.network,
            len(positions),
            x,
            batch["noise"],
            cond,
            use_dir_loss=model.use_dir_loss,
            h_target=repa_target(run, batch, x),
            null_kwargs=uncond,
            time_kwargs={"normal": batch["times"], "position": positions, "global_batch_size": int(batch["total"][0])},
            guidance_kwargs=guidance,
            step=int(batch["step"][0]),
            max_steps=run.config.training.max_train_steps,
        )
    projection = torch.where(kept.any(), projection, 0 * projection)  # without a sample there is nothing to learn
    log["dropped"] = 1 - kept.float().mean()
    codes = torch.where(torch.isfinite(x).flatten(1).all(1), torch.where(kept, 0, LOSS), LATENT)
    return weighted + model.proj_coeff * projection, log, codes


@torch.no_grad()
def latents(run: Run, batch: Batch) -> Tensor:
    """Clean latents (B, C, h, w): stored ones, encoded images, or the pixels themselves."""
    if "latent" in batch or run.vae is None:
        return batch["latent"] if "latent" in batch else batch["image"]
    return run.vae.encode(batch["image"], batch.get("posterior"))


@torch.no_grad()
def repa_target(run: Run, batch: Batch, x: Tensor) -> Tensor | None:
    """REPA features (B, N, z_dim), one for each token of the network: stored ones, or the encoder's; None without REPA."""
    if "features" in batch:
        return batch["features"]
    if run.encoder is None:
        return None
    patch = traits_of(run.network).patch_size
    grid = [side // patch for side in x.shape[2:]]
    return run.encoder.tokens(batch["image"], grid, run.config.model.enc_antialias)


def summary(run: Run) -> str:
    """What is about to be trained, in a few lines."""
    t, a = run.config.training, run.accelerator
    parameters = sum(p.numel() for p in run.network.parameters() if p.requires_grad)
    sizes = run.task.batch_sizes(run.config.data.dataloader.batch_size)
    total = round(sum(sizes) / len(sizes) * t.gradient_accumulation_steps * a.num_processes)
    batch = f"{total} = {sizes[0]}" if len(set(sizes)) == 1 else f"{total} on average = {min(sizes)} to {max(sizes)}"
    return (
        f"network: {parameters / 1e6:.2f}M trained parameters, {t.dtype}, mixed precision {t.mixed_precision}"
        f"{f', adapters on {run.config.model.ckpt}' if run.base else ''}\n"
        f"data: {run.task.summary()}\n"
        f"batch: {batch} x {t.gradient_accumulation_steps} accumulation x {a.num_processes} process(es) on {a.device.type}"
        f"{', weights sharded' if run.sharded else ''}\n"
        f"steps: {t.max_train_steps}, learning rate {run.lr:.3g} ({t.lr_scheduler})"
    )


def closing_line(run: Run) -> str:
    """Where everything is after training, and what to run next."""
    folder, t = run.project_dir, run.config.training
    previews = f"previews in {folder / 'samples'}, " if t.sample_steps else ""
    own = [word for module in run.config.own_modules() for word in ("--allow-code", module)]
    paths = shlex.join(["--config", str(folder / "config.yaml"), "--ckpt", str(folder), *own])
    return (
        f"finished {t.max_train_steps} steps: curves in {folder / 'curves.png'}, {previews}checkpoints in "
        f"{folder / 'checkpoints'}; draw with: python {run.task.draw_with} {paths}"
    )
