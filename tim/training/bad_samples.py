"""The unreadable samples of a run: each is written down once, and counts towards the budget."""

import warnings
from pathlib import Path

from tim.data.batch import Batch
from tim.files import append_json_lines, read_json_lines
from tim.training.logging import rank_file

ALL_FILES = "bad_samples*.jsonl"  # of all ranks


class BadSamples:
    """bad_samples.jsonl of one rank (bad_samples-rank1.jsonl and so on for the others).

    `len()` is this rank's share of the samples that count: the lengths of all ranks add up to them.

    Args:
        project_dir: of the run; what any rank of an earlier attempt wrote there counts on, for rank 0.
        rank: of this process.
    """

    def __init__(self, project_dir: Path, rank: int) -> None:
        self.path = rank_file(project_dir, "bad_samples", rank)
        self.causes = {
            str(record["cause"]) for path in project_dir.glob(ALL_FILES) for record in read_json_lines(path, "cause")
        }
        self.elsewhere = 0 if rank == 0 else len(self.causes)

    def __len__(self) -> int:
        return len(self.causes) - self.elsewhere

    def record(self, batch: Batch) -> None:
        """Write down the samples of a micro-batch that were replaced, unless they are known."""
        for position, cause in zip(batch["position"].tolist(), batch["problem"], strict=True):
            if cause and cause not in self.causes:
                self.causes.add(cause)
                step = int(batch["step"][0]) + 1
                append_json_lines(self.path, [{"step": step, "position": position, "cause": cause}])
                warnings.warn(f"step {step}: replaced by another: {cause}", stacklevel=2)
