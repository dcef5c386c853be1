"""Who answers DPG-Bench's questions: mPLUG, or a vision-language model of transformers under its own name."""

import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from tim.digests import cached_sha256
from tim.evaluation.pretrained import load_pretrained

MPLUG = "mplug"
MPLUG_MODEL = "damo/mplug_visual-question-answering_coco_large_en"
INSTALL = "in an environment of its own: pip install -r projects/evaluate/dpg_bench/requirements_mplug.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT = "{question} Answer with yes or no."
ANSWER_TOKENS = 10


class Judge(Protocol):
    """Answers questions about an image.

    Attributes:
        name: in the result file.
        identity: what its answers depend on: name, weights, how it runs.
        is_official: whether its scores compare with published ones.
    """

    name: str
    identity: dict[str, Any]
    is_official: bool

    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]: ...


def load_judge(name: str, device: torch.device, dtype: str = "float32", batch_size: int = 16) -> Judge:
    """Load a judge.

    Args:
        name: `mplug`, `mplug:<folder of its files>`, or a transformers folder or hub id: a model for visual question
            answering (BLIP, ViLT) or an instruction-tuned image-text-to-text model with a chat template.
        device: where it runs.
        dtype: of transformers' models.
        batch_size: questions that they answer at once.

    Raises:
        ValueError: when it cannot be loaded or cannot answer questions; the message names it.
    """
    official, _, folder = name.partition(":")
    if official == MPLUG:
        return MPlugJudge(folder or MPLUG_MODEL, device)

    import transformers as hf

    from tim.models.text_encoders import DTYPE_KEYWORD

    def choose(config: Any) -> tuple[Any, ...]:
        judge: type[TransformersJudge] = VQAJudge
        kind: Any
        # BLIP-2 is listed as a model for question answering, but continues a text
        if type(config) in hf.MODEL_FOR_VISUAL_QUESTION_ANSWERING_MAPPING and config.model_type != "blip-2":
            kind = hf.AutoModelForVisualQuestionAnswering
        elif type(config) in hf.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            judge, kind = ChatJudge, hf.AutoModelForImageTextToText
        else:
            raise ValueError(f"a {config.model_type} model answers no questions about images")
        return partial(judge, batch_size=batch_size, dtype=dtype), kind, hf.AutoProcessor

    refusal = f"--vqa-model {name} is neither {MPLUG} nor a judge of transformers"
    options: dict[str, Any] = {DTYPE_KEYWORD: DTYPES[dtype]}
    return load_pretrained(name, choose, refusal, device, **options)


def normalise(text: str) -> str:
    """The first word of an answer in lower case, without punctuation; empty when there is none."""
    words = re.search(r"\w+", text.lower())
    return words.group() if words else ""


class MPlugJudge:
    """mPLUG through modelscope's pipeline, which answers one question at a time.

    Args:
        model: modelscope's name of the model, or a folder with its files.
        device: where it runs.

    Raises:
        ValueError: when modelscope or the model cannot be loaded; the message says how to install what it needs.
    """

    is_official = True
    identity: dict[str, Any]

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
        self.identity = {"name": self.name, "weights_sha256": {p.name: cached_sha256(p) for p in sorted(folder.glob("*.bin"))}}

    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers to questions about an image, as mPLUG words them."""
        return [found["text"] for found in self.pipeline([{"image": image, "question": text} for text in questions])]


class TransformersJudge:
    """What the judges of transformers share: batches of questions about one image, answers cut to their first word."""

    is_official = False

    def __init__(self, model: Any, identity: dict[str, Any], processor: Any, batch_size: int, dtype: str) -> None:
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.name, self.identity = identity["name"], {**identity, "dtype": dtype, "questions_a_batch": batch_size}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        """Answers to questions about an image."""
        parts = [questions[i : i + self.batch_size] for i in range(0, len(questions), self.batch_size)]
        return [normalise(answer) for part in parts for answer in self._answer(image, part)]

    def _answer(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        raise NotImplementedError

    def _to_device(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inputs where the model is, pixels in its dtype."""
        device, dtype = self.model.device, self.model.dtype
        return {name: x.to(device, dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


class VQAJudge(TransformersJudge):
    """A model for visual question answering: it chooses among its answers (ViLT) or writes one (BLIP)."""

    def __init__(self, model: Any, identity: dict[str, Any], processor: Any, batch_size: int, dtype: str) -> None:
        self.writes = model.can_generate()
        # transformers' BLIP does not mask padding when it writes, so that answers would depend on the other questions
        super().__init__(model, identity, processor, 1 if self.writes else batch_size, dtype)

    def _answer(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        images = [image] * len(questions)
        inputs = self.processor(images=images, text=list(questions), padding=True, truncation=True, return_tensors="pt")
        inputs = self._to_device(inputs)
        if self.writes:
            ids = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False)
            return self.processor.batch_decode(ids, skip_special_tokens=True)
        return [self.model.config.id2label[k] for k in self.model(**inputs).logits.argmax(dim=-1).tolist()]


class ChatJudge(TransformersJudge):
    """An instruction-tuned model that is asked to answer with yes or no."""

    def __init__(self, model: Any, identity: dict[str, Any], processor: Any, batch_size: int, dtype: str) -> None:
        super().__init__(model, {**identity, "prompt": PROMPT}, processor, batch_size, dtype)
        if getattr(processor, "chat_template", None) is None:
            raise ValueError("its processor has no chat template; choose an instruction-tuned model")
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # so that every answer begins where its prompt ends
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    def _answer(self, image: Image.Image, questions: Sequence[str]) -> list[str]:
        texts = [self._chat(PROMPT.format(question=question)) for question in questions]
        bos = self.processor.tokenizer.bos_token
        inputs = self.processor(
            images=[[image]] * len(texts),
            text=texts,
            padding=True,
            add_special_tokens=not (bos and texts[0].startswith(bos)),  # templates bring their own beginning
            return_tensors="pt",
        )
        inputs, pad = self._to_device(inputs), self.processor.tokenizer.pad_token_id
        ids = self.model.generate(**inputs, max_new_tokens=ANSWER_TOKENS, do_sample=False, pad_token_id=pad)
        return self.processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _chat(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        chat = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
