"""What was trained with which settings: what may not change unnoticed between two starts of a run, and what did."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tim.checkpoint.weights import BASE
from tim.config import Config, Target, to_yaml
from tim.data.latents import classes_identity
from tim.files import write_text
from tim.training.setup import Run
from tim.typed_yaml import flatten, read_tree

logger = logging.getLogger(__name__)

NEUTRAL = ("use_checkpoint", "tangent_form")  # keywords of networks that do not change what they compute


def what_must_stay(run: Run) -> dict[str, Any]:
    """What a run cannot go on without noticing when it is another: dataset, network, transport, class of the optimiser.

    Returns:
        JSON values by dotted name.
    """
    m, dataset = run.config.model, run.task.dataset
    samples = getattr(dataset, "samples", dataset)  # cached features wrap them
    files = getattr(samples, "files", samples)
    names = getattr(files, "class_names", None)
    data = {
        "samples": len(dataset),
        "batches": len(dataset.batches) if hasattr(dataset, "batches") else None,
        "labels": getattr(dataset, "num_labels", None),
        **(classes_identity(names) if names else {}),
    }
    lora = {} if m.lora is None else {"lora": asdict(m.lora), BASE: run.base}
    parts = {"network": _keywords(m.network), "transport": _keywords(m.transport), "dataset": data, **lora}
    found = {name: value for name, value in flatten(parts).items() if value is not None}
    return json.loads(json.dumps(found | {"optimizer": run.config.training.optimizer.target}, default=str))


def check_unchanged(before: dict[str, Any], now: dict[str, Any], path: Path, allowed: bool) -> None:
    """Compare `what_must_stay` of a checkpoint and of today. What only one of them knows of is not compared.

    Raises:
        ValueError: when they differ and it is not allowed; names each difference.
    """
    changed = [f"{name} {before[name]!r}, now {now[name]!r}" for name in before if name in now and before[name] != now[name]]
    if not changed:
        return
    words = f"{path} was trained with {'; '.join(changed)}"
    if not allowed:
        raise ValueError(f"{words}. Start another --project_dir, or go on all the same with --allow-changes")
    logger.warning(words)


def report_changes(record: Path, config: Config) -> None:
    """Log every key in which today's configuration differs from the one that a project folder was trained with so far."""
    if not record.is_file():
        return
    try:
        before = flatten(read_tree(record))
    except ValueError as error:
        logger.warning(f"what changed since the last start is unknown: {error}")
        return
    now = flatten(json.loads(json.dumps(asdict(config), default=str)))
    before, now = ({key: value for key, value in flat.items() if value != {}} for flat in (before, now))
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            logger.info(f"changed since the last start: {key}: {before.get(key)!r} -> {now.get(key)!r}")


def keep_config(project_dir: Path, config: Config, step: int) -> None:
    """Write config.yaml; one that was different goes to configs/NUMBER-until-step-N.yaml.

    Args:
        step: from which the run goes on.
    """
    path, text, folder = project_dir / "config.yaml", to_yaml(config), project_dir / "configs"
    before = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else text
    if before != text:
        number = 1 + len(list(folder.glob("*.yaml")))
        write_text(folder / f"{number:03d}-until-step-{step:07d}.yaml", before)
    write_text(path, text)


def _keywords(target: Target) -> dict[str, Any]:
    """Class and keywords of a target that decide what it computes."""
    return {"target": target.target} | {k: v for k, v in target.keywords().items() if k not in NEUTRAL}
