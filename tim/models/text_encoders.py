"""Frozen text encoders of transformers (causal LM, T5, BERT-like) behind one interface."""

import hashlib
import json
import warnings
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
import transformers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from tim.digests import cached_sha256
from tim.distributed import to_device
from tim.models.hub import hub_options

PADDINGS = ("mask", "batch")
IDENTIFYING = {".json", ".txt", ".model", ".safetensors", ".bin"}  # suffixes of configs, vocabularies and weights
DTYPE_KEYWORD = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"


class TextEncoder:
    """Frozen text encoder: captions to features, one row a caption.

    Args:
        text_encoder_dir: transformers folder or hub id, of which the decoder of a causal LM, the encoder of T5, or an encoder
            itself is loaded.
        max_length: longest caption in tokens, special tokens included.
        use_last_hidden_state: features after the last layer as the model returns them, else after the second to last.
        padding: `mask` marks and zeroes padding; `batch` shows it: features of the padding up to the batch's longest caption.
        lazy: load the model when the first caption is encoded, which a cache may make needless.

    Attributes:
        width: features a token.

    Raises:
        ValueError: when nothing can be loaded from text_encoder_dir, or an option is out of range.
    """

    def __init__(
        self,
        text_encoder_dir: str,
        *,
        max_length: int = 256,
        use_last_hidden_state: bool = True,
        padding: str = "mask",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lazy: bool = False,
    ) -> None:
        self.name, self.dtype, self.device = text_encoder_dir, dtype, torch.device(device)
        try:
            self._options = options = hub_options(text_encoder_dir)
            config = AutoConfig.from_pretrained(text_encoder_dir, trust_remote_code=False, **options)
            config = config if hasattr(config, "hidden_size") else config.get_text_config()
            self.width, positions = config.hidden_size, getattr(config, "max_position_embeddings", None)
            self.folder = Path(cached_file(text_encoder_dir, "config.json", **options)).parent
            self.tokenizer = load_tokenizer(text_encoder_dir, self.folder, **options)
        except Exception as error:  # the failures of transformers, tokenizers and safetensors share no base class
            raise self._refusal(error) from error
        self.hub_id = None if Path(text_encoder_dir).is_dir() else text_encoder_dir
        self._set_up(positions, max_length, use_last_hidden_state, padding)
        _ = None if lazy else self.model  # so that weights that do not load are refused now

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 256,
        use_last_hidden_state: bool = True,
        padding: str = "mask",
        device: torch.device | str | None = None,
    ) -> "TextEncoder":
        """A text encoder of a loaded model; it computes on `device` when hooks move its weights there. The rest as above."""
        encoder = cls.__new__(cls)
        encoder.name, encoder.dtype, encoder.device = model.name_or_path, model.dtype, torch.device(device or model.device)
        encoder.model, encoder.tokenizer, encoder.width = model, tokenizer, model.config.hidden_size
        encoder._set_up(getattr(model.config, "max_position_embeddings", None), max_length, use_last_hidden_state, padding)
        return encoder

    def _set_up(self, positions: int | None, max_length: int, use_last_hidden_state: bool, padding: str) -> None:
        if padding not in PADDINGS:
            raise ValueError(f"model.text_padding={padding!r} is none of {', '.join(PADDINGS)}")
        special = self.tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise ValueError(f"model.max_seq_length={max_length} leaves no room for text beside {special} special tokens")
        if positions and 0 < positions < max_length:
            raise ValueError(f"model.max_seq_length={max_length} is above the {positions} positions of the text encoder")
        self.max_length, self.use_last_hidden_state, self.padding = max_length, use_last_hidden_state, padding
        # Tokenizers that were trained to cut on the left would lose what a caption begins with, its subject.
        self.tokenizer.truncation_side = "right"
        bos, eos, pad = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        self.blank = next((i for i in (bos, eos, pad) if i is not None), 0)  # stands for a caption without any token
        self.pad = next((i for i in (pad, eos) if i is not None), self.blank)
        self._warned: set[str] = set()

    @cached_property
    def model(self) -> PreTrainedModel:
        """The part of the checkpoint that encodes, on the device.

        Raises:
            ValueError: when its weights do not load.
        """
        try:
            return load_model(self.name, self.dtype, **self._options).to(self.device).eval().requires_grad_(False)
        except Exception as error:
            raise self._refusal(error) from error

    def _refusal(self, error: Exception) -> ValueError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ValueError(f"model.text_encoder_dir={self.name!r} is no text encoder folder or hub id: {reason}")

    @cached_property
    def identity(self) -> str:
        """Short hash of all that determines a caption's features: files (or hub id and revision), length, layer, dtype."""
        if self.hub_id is None:
            files = sorted(f for f in self.folder.iterdir() if f.suffix in IDENTIFYING)
            source = {f.name: cached_sha256(f) for f in files}
        else:
            source = {"id": self.hub_id, "revision": self.folder.name}  # the hub's cache names folders by revision
        facts = [source, self.max_length, self.use_last_hidden_state, str(self.dtype)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Encode captions; the empty string is the null caption. A caption above max_length is cut with a warning.

        Returns:
            features (B, M, width) in the encoder's dtype on its device, M the longest caption's number of tokens;
            mask (B, M) bool, True for real tokens, None when every position counts.

        Raises:
            ValueError: when captions is empty or holds anything but strings.
        """
        check_captions(captions)
        rows = [torch.tensor(row) for row in self._tokenize(captions)]
        ids = to_device(pad_sequence(rows, batch_first=True, padding_value=self.pad), self.device)
        mask = real_tokens(rows)
        # No mask where it hides nothing: the fastest attention kernels take none.
        is_masked = self.padding == "mask" and not mask.all()
        mask = to_device(mask, self.device)
        # an autocast around the call would change the features behind the cache's back
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            last = self.use_last_hidden_state
            output = self.model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=not last)
        # A causal LM's last layer is trained to predict the next token; the one before it may say more about the text.
        y = (output.last_hidden_state if last else output.hidden_states[-2]).to(self.dtype)
        return (y.masked_fill(~mask.unsqueeze(-1), 0), mask) if is_masked else (y, None)

    def _tokenize(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of every caption, at least one and at most max_length each."""
        rows = self.tokenizer(list(captions), verbose=False)["input_ids"]
        for i, (caption, row) in enumerate(zip(captions, rows, strict=True)):
            if len(row) > self.max_length:
                rows[i] = self.tokenizer(caption, truncation=True, max_length=self.max_length)["input_ids"]
                if caption not in self._warned:
                    self._warned.add(caption)
                    warnings.warn(self._describe_cut(caption, row, rows[i]), stacklevel=3)
        return [row or [self.blank] for row in rows]

    def _describe_cut(self, caption: str, full: list[int], cut: list[int]) -> str:
        kept = next((i for i, (a, b) in enumerate(zip(full, cut, strict=False)) if a != b), len(cut))
        lost = self.tokenizer.decode(full[kept:], skip_special_tokens=True).strip()
        return (
            f"caption {shorten(caption, 40)!r} has {len(full)} tokens; it was cut to max_seq_length={self.max_length} "
            f"without {shorten(lost, 80)!r}"
        )


def load_model(text_encoder_dir: str, dtype: torch.dtype, **options: bool) -> PreTrainedModel:
    """The part of a checkpoint that turns token ids into hidden states; its config decides which that is.

    Args:
        options: of `tim.models.hub.hub_options`.

    Raises:
        ValueError: when the checkpoint lacks weights of that part, or the part does not encode text.
    """
    options |= {"trust_remote_code": False}  # None would ask, and a pipe say yes
    config = AutoConfig.from_pretrained(text_encoder_dir, **options)
    if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:  # T5 without its decoder, BERT and its kin
        kind, part = AutoModelForTextEncoding, None
    elif config.is_encoder_decoder:
        kind, part = AutoModel, "get_encoder"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # transformers 4.50 finds Gemma-3's weights only with the head
        kind, part = AutoModelForCausalLM, "get_decoder"
    else:
        kind, part = AutoModel, None
    whole, report = kind.from_pretrained(text_encoder_dir, output_loading_info=True, **{DTYPE_KEYWORD: dtype}, **options)
    model = whole if part is None else getattr(whole, part)() if hasattr(whole, part) else whole.base_model
    if not hasattr(model.config, "hidden_size"):
        raise ValueError(f"{type(model).__name__} does not encode text")
    own = {id(p) for p in model.parameters()}
    names = {name for name, p in whole.named_parameters(remove_duplicate=False) if id(p) in own}
    missing = sorted(key for key in names.intersection(report["missing_keys"]) if "pooler" not in key)  # poolers are not run
    if missing:
        raise ValueError(f"{len(missing)} weights of {type(model).__name__} are missing, first: {', '.join(missing[:3])}")
    model.config.use_cache = False  # keys and values are for generating text, of which there is none
    return model


def load_tokenizer(text_encoder_dir: str, folder: Path, **options: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint whose files are in `folder`; `options` as for `load_model`.

    Raises:
        ValueError: when there is none; transformers 5 would make up an empty one.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(text_encoder_dir, trust_remote_code=False, **options)
    except Exception as error:  # see TextEncoder.from_pretrained
        raise ValueError(f"its tokenizer does not load: {error}") from error
    vocabularies = tokenizer.vocab_files_names.values()
    if vocabularies and not any((folder / name).is_file() for name in vocabularies):
        raise ValueError(f"it has no tokenizer ({' or '.join(vocabularies)})")
    return tokenizer


def check_captions(captions: Sequence[str]) -> None:
    """Raise ValueError unless captions is a sequence of at least one string."""
    if isinstance(captions, str) or len(captions) == 0:
        raise ValueError(f"captions={captions!r} must be a list of at least one string")
    for i, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {i} is {caption!r}, a {type(caption).__name__}, not a string")


def real_tokens(rows: Sequence[Tensor]) -> Tensor:
    """(B, M) bool: True in the first len(row) positions of every row, M the longest."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def shorten(text: str, length: int) -> str:
    """The text, or its beginning and an ellipsis in `length` characters."""
    return text if len(text) <= length else f"{text[: length - 1]}…"
