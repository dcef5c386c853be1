"""GenEval's result file and its summary."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tim.files import parse_json, read_text, write_text

FIELDS = ("filename", "tag", "prompt", "correct", "reason", "metadata", "details")


def result_line(judgement: dict[str, Any]) -> str:
    """A judgement as a line of the result file, the same bytes as the published evaluation writes.

    `metadata` and `details` are JSON inside a string, slashes and all that is not ASCII are escaped.
    """
    flat = {key: judgement[key] if key not in ("metadata", "details") else json.dumps(judgement[key]) for key in FIELDS}
    return json.dumps(flat, separators=(",", ":")).replace("/", "\\/")


def write_results(path: Path, judgements: Iterable[dict[str, Any]]) -> None:
    """Write the result file so that it is either whole or absent."""
    write_text(path, "".join(result_line(judgement) + "\n" for judgement in judgements))


def read_results(path: Path) -> list[dict[str, Any]]:
    """Judgements of a result file, ours or one of the published evaluation.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: names the line that is no result, or says that there is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no result file {path}; evaluate_images.py writes it")
    judgements = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            flat = parse_json(line)
            metadata, details = parse_json(flat["metadata"]), parse_json(flat["details"])
            if not (isinstance(flat["correct"], bool) and isinstance(flat["tag"], str)):
                raise TypeError("`correct` must be true or false, `tag` a text")
            judgements.append({**{key: flat[key] for key in FIELDS}, "metadata": metadata, "details": details})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no result of GenEval: {error!r}") from error
    if not judgements:
        raise ValueError(f"{path} holds no result")
    return judgements


def summarize(judgements: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of all images.

    Args:
        judgements: at least one; `tag`, `metadata` and `correct` count.

    Returns:
        images and prompts (numbers), correct_images and correct_prompts (fractions; a prompt is correct when one of its
        images is), tasks (by tag, in order of appearance: correct, n, accuracy) and overall, the mean of the accuracies.
    """
    prompts: dict[str, bool] = {}
    tasks: dict[str, dict[str, Any]] = {}
    for judgement in judgements:
        key = json.dumps(judgement["metadata"], sort_keys=True)
        prompts[key] = prompts.get(key, False) or judgement["correct"]
        task = tasks.setdefault(judgement["tag"], {"correct": 0, "n": 0})
        task["correct"] += int(judgement["correct"])
        task["n"] += 1
    for task in tasks.values():
        task["accuracy"] = task["correct"] / task["n"]
    return {
        "images": len(judgements),
        "prompts": len(prompts),
        "correct_images": sum(task["correct"] for task in tasks.values()) / len(judgements),
        "correct_prompts": sum(prompts.values()) / len(prompts),
        "tasks": tasks,
        "overall": sum(task["accuracy"] for task in tasks.values()) / len(tasks),
    }


def summary_text(scores: dict[str, Any]) -> str:
    """What `summarize` returns as the published evaluation prints it."""
    lines = [
        "Summary",
        "=======",
        f"Total images: {scores['images']}",
        f"Total prompts: {scores['prompts']}",
        f"% correct images: {scores['correct_images']:.2%}",
        f"% correct prompts: {scores['correct_prompts']:.2%}",
        "",
        "Task breakdown",
        "==============",
    ]
    for tag, task in scores["tasks"].items():
        lines.append(f"{tag:<16} = {task['accuracy']:.2%} ({task['correct']} / {task['n']})")
    return "\n".join([*lines, "", f"Overall score (avg. over tasks): {scores['overall']:.5f}"])
