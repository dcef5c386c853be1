"""Stopping a run and going on with it: checkpoints, preemption, and how the global batch is split anew."""

import copy
import logging
import time
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tim.checkpoint import store
from tim.checkpoint.accelerate_folder import is_accelerate_folder, latest_folder, load_folder
from tim.checkpoint.formats import Snapshot, build_stager, take_snapshot
from tim.config import parse_walltime
from tim.distributed import cpu_group, on_first_rank
from tim.training.bad_samples import BadSamples
from tim.training.guards import NonFiniteGuard
from tim.training.history import check_unchanged, report_changes, what_must_stay
from tim.training.logging import plot_curves
from tim.training.preemption import Preemption
from tim.training.setup import Run
from tim.typed_yaml import NotNegative, PositiveFloat, convert

SAVED: dict[str, tuple[Any, set[str]]] = {  # what a trainer's state.json says, and what these parts have
    "seed": (NotNegative, set()),
    "samples_seen": (NotNegative, set()),
    "lr": (PositiveFloat, set()),
    "lr_scheduler": (dict[str, Any], {"last_epoch", "lr_lambdas"}),
    "batch": (dict[str, Annotated[int, "> 0", "<= 16777216"]], {"size", "accumulation", "global"}),
    "scaler": (dict[str, Any], set()),
    "guard": (dict[str, list[float]], {"counts", "norms"}),
    "settings": (dict[str, Any], set()),
}

logger = logging.getLogger(__name__)


class CheckpointManager:
    """The checkpoints of a run in its project folder, and what else outlives an interruption.

    Args:
        allow_changes: go on with another dataset, network, transport or optimiser than the checkpoint's.

    Attributes:
        preemption: whether to leave after this step; a context manager that handles signals while it is open.
        bad_samples: the samples that could not be read so far. guard: judges the steps. There are none before `resume`.
    """

    def __init__(self, run: Run, allow_changes: bool = False) -> None:
        t = run.config.training
        wanted = t.resume_from_checkpoint
        if wanted not in (None, "latest") and not Path(wanted).is_dir():  # before the project folder is made
            raise FileNotFoundError(f"training.resume_from_checkpoint={wanted!r} is no checkpoint folder")
        self.run, self.root, self.allow_changes = run, run.project_dir / "checkpoints", allow_changes
        # As configured: `fit_global_batch` may change the run's config, and a third start must compare with what was asked for.
        self.config, self.settings = run.config, what_must_stay(run)
        self.batch = {"size": run.config.data.dataloader.batch_size, "accumulation": t.gradient_accumulation_steps}
        self.group = cpu_group()  # of whoever writes, possibly a thread; the steps have their own
        self.preemption = Preemption(cpu_group(), parse_walltime(t.walltime))
        self.saver = store.Saver(t.async_checkpoint)
        self.stager = build_stager(run.accelerator.device) if t.async_checkpoint else None
        self.bad_samples: BadSamples
        self.guard: NonFiniteGuard

    def resume(self) -> tuple[int, int]:
        """Load the checkpoint that `resume_from_checkpoint` names; returns (step, samples_seen), (0, 0) for a fresh start.

        Raises:
            ValueError, FileNotFoundError: when it is not there, is damaged or belongs to another run.
        """
        run, accelerator = self.run, self.run.accelerator
        self.bad_samples = BadSamples(run.project_dir, accelerator.process_index)  # before any rank meets a new one
        path, verified = self._wanted_checkpoint()
        state: dict[str, Any] = {"step": 0, "samples_seen": 0}
        if path is not None and is_accelerate_folder(path):
            state["step"] = self._import(path)
        elif path is not None:
            state = store.load_checkpoint(path, run.modules, run.optimizer.optimizer, self.group, verified)
            self._take_over(state, path)
            logger.info(f"resuming from {path} at step {state['step']}")
            report_changes(path.parent.parent / "config.yaml", self.config)
        spike = run.config.training.max_grad_norm_spike
        self.guard = NonFiniteGuard(accelerator.device, run.project_dir, accelerator.process_index, state["step"], spike)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        return state["step"], state.get("samples_seen", state.get("visits", 0))  # version 0.1 wrote visits

    def _import(self, path: Path) -> int:
        """Go on with a checkpoint of accelerate; returns its step. The order of data begins anew, the schedule goes on."""
        run = self.run
        step = load_folder(path, run.modules, run.optimizer.optimizer)
        run.lr_scheduler.last_epoch = step
        _set_base_lr(run)
        logger.info(f"going on from {path}, a checkpoint of accelerate, at step {step}; the order of samples begins anew")
        return step

    def _take_over(self, state: dict[str, Any], path: Path) -> None:
        """Go on where a checkpoint's state says; ValueError when it is of a run that this one cannot continue."""
        run, scaler = self.run, self.run.accelerator.scaler
        absent = {"seed", "scaler", "batch", "lr", "lr_scheduler"} - state.keys()
        if absent:
            raise ValueError(f"{path / 'state.json'} has no {', '.join(sorted(absent))}: it is no trainer's checkpoint")
        check_saved(state, f"{path / 'state.json'}: ")
        if state["seed"] != run.seed:
            raise ValueError(f"{path} was trained with --seed {state['seed']}, not {run.seed}")
        newer = [p.name for p in store.list_checkpoints(self.root) if store.step_of(p) > state["step"]]
        if newer and run.config.training.resume_from_checkpoint != "latest":
            raise ValueError(
                f"{self.root} holds newer checkpoints than {path} ({', '.join(newer)}), from which a later start would go on; "
                "continue with training.resume_from_checkpoint=latest, move them away, or choose another --project_dir"
            )
        check_unchanged(state.get("settings", {}), self.settings, path, self.allow_changes)  # version 0.1 has none
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        fit_global_batch(run, state["batch"])
        known = run.lr_scheduler.state_dict()  # it would take anything for its own
        run.lr_scheduler.load_state_dict(known | {k: v for k, v in state["lr_scheduler"].items() if k in known})
        if run.lr != state["lr"]:
            logger.info(f"the learning rate changes from {state['lr']:.3g} to {run.lr:.3g}")
        _set_base_lr(run)

    def save(self, step: int, samples_seen: int) -> None:
        """Checkpoint the state after `step`, retire old ones, draw the curves; at once or, once it is copied, in a thread."""
        began, run = time.monotonic(), self.run
        self.saver.wait()  # it reads the snapshot before this one, whose memory is taken again
        scaler, sharded = run.accelerator.scaler, run.config.training.checkpoint_format == "sharded"
        snapshot = take_snapshot(run.modules, run.optimizer.optimizer, sharded, self.stager)
        state = {
            "scaler": scaler.state_dict() if scaler else None,
            "seed": run.seed,
            "samples_seen": samples_seen,
            "lr": run.lr,
            "lr_scheduler": copy.deepcopy(run.lr_scheduler.state_dict()),  # it goes on while a thread writes
            "batch": {**self.batch, "processes": run.accelerator.num_processes, "global": run.global_batch_size},
            "guard": self.guard.state_dict(),
            "modules": list(run.modules),
            "settings": self.settings,
        }
        self.saver.submit(partial(self._write, step, snapshot, state, began))

    def close(self) -> None:
        """Wait for the last save; raises its error."""
        self.saver.wait()

    def _write(self, step: int, snapshot: Snapshot, state: dict[str, Any], began: float) -> None:
        """The part of `save` that does not need the network, maybe in a thread. Collective over the writers' group."""
        t = self.run.config.training
        store.write_checkpoint(self.root, step, snapshot, state, self.group)
        if self.run.accelerator.is_main_process:
            store.prune_checkpoints(self.root, t.checkpoints_total_limit, t.checkpoint_list)
            plot_curves(self.run.project_dir / "log.jsonl", self.run.project_dir / "curves.png")
        self.preemption.saved(time.monotonic() - began)

    def _wanted_checkpoint(self) -> tuple[Path | None, bool]:
        """The folder to load, the same on all ranks, and whether it is known to be whole."""
        wanted = self.run.config.training.resume_from_checkpoint
        if wanted == "latest":
            # By the group of checkpoints, whose timeout leaves rank 0 the hours that reading large files may take.
            return on_first_rank(self.group, lambda: self._latest() or latest_folder(self.run.project_dir)), True
        if wanted is None:
            if store.list_checkpoints(self.root) or latest_folder(self.run.project_dir):
                raise ValueError(
                    f"{self.root} holds checkpoints of an earlier run; continue it with "
                    "training.resume_from_checkpoint=latest or choose another --project_dir"
                )
            return None, True
        return Path(wanted), False

    def _latest(self) -> Path | None:
        """The newest whole checkpoint of the project folder, None for a fresh start; says what it passes over."""
        store.tidy_checkpoints(self.root)
        found = store.latest_checkpoint(self.root)
        if found is None and store.list_checkpoints(self.root):
            raise ValueError(
                f"none of the checkpoints in {self.root} can be used, and a fresh start would take their place; name another "
                "by training.resume_from_checkpoint=PATH, or choose another --project_dir"
            )
        others = sorted(path.name for path in self.root.glob("*") if store.is_checkpoint(path))
        if found is None and others:
            logger.warning(f"{self.root} has no step-N; {', '.join(others)} would be taken by resume_from_checkpoint=PATH only")
        return found


def check_saved(state: dict[str, Any], place: str) -> None:
    """Compare what a state.json says with what a trainer writes; keys that version 0.1 did not have may be missing.

    Args:
        place: of the state, for messages.

    Raises:
        ValueError: names the first value that no trainer wrote.
    """
    for key, (hint, parts) in SAVED.items():
        if key in state:
            value = convert(state[key], hint, place + key)
            absent = parts - value.keys() if parts else set()
            if absent:
                raise ValueError(f"{place}{key} has no {min(absent)}")
    convert(state["lr_scheduler"]["last_epoch"], NotNegative, f"{place}lr_scheduler.last_epoch")
    if len(state.get("guard", {"counts": range(3)})["counts"]) != 3:
        raise ValueError(f"{place}guard.counts must have three numbers")


def fit_global_batch(run: Run, saved: dict[str, int]) -> None:
    """Split the checkpoint's global batch over the processes of today.

    Done when only the number of processes differs. Who sets another batch size or accumulation gets what they ask for.

    Args:
        saved: size (per device and micro-batch) and accumulation as configured, processes, and the global batch.

    Raises:
        ValueError: when the global batch cannot be split evenly.
    """
    config, processes, total = run.config, run.accelerator.num_processes, saved["global"]
    size, accumulation = config.data.dataloader.batch_size, config.training.gradient_accumulation_steps
    if run.global_batch_size == total:
        return
    if (size, accumulation) != (saved["size"], saved["accumulation"]):
        logger.info(f"the global batch changes from {total} to {run.global_batch_size}, as configured")
        return
    packed = config.data.data_type == "image_ms"  # its batches come packed and cannot be cut
    fitting = (
        a
        for a in range(1, total // processes + 1)
        if total % (processes * a) == 0 and (total == processes * a * size if packed else total <= processes * a * size)
    )
    accumulation = next(fitting, 0)
    if accumulation == 0:
        raise ValueError(
            f"the global batch of the checkpoint, {total}, cannot be split over {processes} processes with "
            f"data.dataloader.batch_size={size}; use another number of processes, or set batch_size or "
            "training.gradient_accumulation_steps to train on with another global batch"
        )
    size = total // (processes * accumulation)
    # A copy: config.yaml keeps what was asked for, so that every later start splits the batch anew.
    run.config = copy.deepcopy(config)
    run.config.data.dataloader.batch_size, run.config.training.gradient_accumulation_steps = size, accumulation
    run.lr, run.global_batch_size = config.training.scaled_learning_rate(total), total
    logger.info(
        f"the global batch stays {total}: {size} x {accumulation} accumulation x {processes} process(es) "
        f"instead of {saved['processes']}"
    )


def _set_base_lr(run: Run) -> None:
    """Go on with today's learning rate and schedule at the same place of it.

    A scheduler reads its base rate once, and optimisers and schedulers load the rates of the checkpoint.
    """
    scheduler, (group,) = run.lr_scheduler, run.optimizer.param_groups
    group["initial_lr"], group["lr"] = run.lr, run.lr * scheduler.lr_lambdas[0](scheduler.last_epoch)
    scheduler.base_lrs, scheduler._last_lr = [run.lr], [group["lr"]]
