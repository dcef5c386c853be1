"""DPG-Bench's official judge: mPLUG for visual question answering, run by modelscope."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from tim.files import sha256

MODEL = "damo/mplug_visual-question-answering_coco_large_en"
INSTALL = "in an environment of its own: pip install -r projects/evaluate/dpg_bench/requirements_mplug.txt"


class MPlugJudge:
    """mPLUG through modelscope's pipeline, which answers one question at a time.

    Args:
        model: modelscope's name of the model, or a folder with its files.
        device: where it runs.

    Raises:
        ValueError: when modelscope or the model cannot be loaded; the message says how to install what it needs.
    """

    is_official = True

    def __init__(self, model: str, device: torch.device) -> None:
        try:
            from modelscope.pipelines import pipeline
            from modelscope.utils.constant import Tasks
        except ImportError as error:
            raise ValueError(f"the judge mplug needs modelscope ({error}); {INSTALL}") from error
        try:
            self.pipeline = pipeline(Tasks.visual_question_answering, model=model, device=str(device))
        except Exception as error:  # modelscope wraps missing packages, failed downloads and damaged files in many classes
            raise ValueError(f"modelscope cannot load {model}: {' '.join(str(error).split())}; it needs, {INSTALL}") from error
        logging.getLogger().setLevel(logging.WARNING)  # the packages it imports leave it at DEBUG, for every other package
        folder = Path(self.pipeline.model.model_dir)
        self.name = folder.resolve().name if Path(model).is_dir() else model
        self.identity = {"name": self.name, "weights_sha256": {p.name: sha256(p) for p in sorted(folder.glob("*.bin"))}}

    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers to questions about an image, as mPLUG words them."""
        return [found["text"] for found in self.pipeline([{"image": image, "question": text} for text in questions])]
