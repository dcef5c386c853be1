"""What is in a weights file, a checkpoint or a training project."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from tim.checkpoint.accelerate_folder import latest_folder, weights_files
from tim.checkpoint.formats import has_weights, is_sharded, read_weights
from tim.checkpoint.store import find_corruption, is_checkpoint, list_checkpoints
from tim.checkpoint.weights import empty_network
from tim.config import load_config
from tim.files import read_json
from tim.models.loading import check_state, read_state_dict


def inspect(source: str, configs: Sequence[Path]) -> tuple[list[str], bool]:
    """Describe a weights file, a checkpoint folder (accelerate's too) or a project folder.

    Args:
        configs: YAML files among which to look for those that the weights fit; a project's own comes first.

    Returns:
        Lines for people, and whether anything is damaged.

    Raises:
        FileNotFoundError: when source is none of these.
    """
    path = Path(source)
    if path.is_file():
        return _describe_file(path, configs)
    if files := weights_files(path) or weights_files(latest_folder(path) or path):
        described = [_describe_file(file, configs) for file in files.values()]
        return [line for lines, _ in described for line in lines], any(damaged for _, damaged in described)
    is_project = (path / "checkpoints").is_dir()
    folders = list_checkpoints(path / "checkpoints") if is_project else [path]
    if not folders or not (is_project or is_checkpoint(path)):
        raise FileNotFoundError(f"{source} is neither a weights file, a checkpoint folder nor a project with checkpoints")
    problems = {folder: find_corruption(folder) for folder in folders}
    lines = [line for folder, problem in problems.items() for line in _describe_files(folder, problem)]
    whole = [folder for folder, problem in problems.items() if problem is None]
    if whole:
        newest = whole[-1]
        state = read_weights(newest, "model", shapes_only=True)
        own = newest.parent.parent / "config.yaml"
        lines += [f"weights of {newest.name}: {_count(state)}; EMA: {'yes' if has_weights(newest, 'ema') else 'no'}"]
        lines += [_fit(newest.name, state, [*([own] if own.is_file() else []), *configs])]
    return lines, len(whole) < len(folders)


def _describe_file(path: Path, configs: Sequence[Path]) -> tuple[list[str], bool]:
    """A weights file; read_state_dict says what is wrong with a damaged one."""
    try:
        state = read_state_dict(path)
    except ValueError as error:
        return [str(error)], True
    lines = [f"{path}: valid, {path.stat().st_size} bytes", f"weights: {_count(state)}"]
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as f:
            lines += [f"{key}: {value}" for key, value in sorted((f.metadata() or {}).items())]
    return [*lines, _fit(path.name, state, configs)], False


def _describe_files(folder: Path, problem: str | None) -> list[str]:
    """A checkpoint's step, state and files."""
    try:
        step = read_json(folder / "state.json")["step"]
    except (OSError, ValueError, KeyError, TypeError):
        step = "unknown"
    kind = "sharded" if is_sharded(folder) else "full"
    lines = [f"{folder.name}: step {step}, {kind}, " + ("valid" if problem is None else f"DAMAGED: {problem}")]
    return lines + [f"  {p.name}: {p.stat().st_size} bytes" for p in sorted(folder.iterdir()) if p.is_file()]


def _count(state: dict[str, Tensor]) -> str:
    """Tensors, parameters and dtypes in a line."""
    dtypes = Counter(str(v.dtype).removeprefix("torch.") for v in state.values())
    parameters = sum(v.numel() for v in state.values())
    return f"{len(state)} tensors, {parameters} parameters ({parameters / 1e6:.2f}M), {', '.join(sorted(dtypes))}"


def _fit(name: str, state: dict[str, Tensor], configs: Sequence[Path]) -> str:
    """Which configs' networks have these keys and shapes."""
    fitting, difference = [], ""
    for path in configs:
        try:
            check_state(empty_network(load_config(path)), state, name)
        except ValueError as error:
            difference = difference or f"against {path}: {error}"
        else:
            fitting.append(str(path))
    return f"fits: {', '.join(fitting)}" if fitting else f"fits none of {len(configs)} configs; {difference}"
