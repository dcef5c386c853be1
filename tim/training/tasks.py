"""What differs between class-conditional and text-to-image training: data, conditions, previews.

Both tasks have the attributes of `ClassTask` and its methods, which `CaptionTask` describes only where it differs.
"""

import re
from collections import Counter
from collections.abc import Sequence
from threading import Lock
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from tim.config import Config
from tim.data.batch import Batch
from tim.data.features import CachedFeatures, check_features, has_features
from tim.data.registry import build_c2i_dataset, build_t2i_dataset
from tim.data.replacement import PROBED, LabelledSamples, first_readable
from tim.data.sampler import BucketBatchSampler, StepBatchSampler
from tim.distributed import inference_dtype
from tim.models.autoencoders import Autoencoder
from tim.models.network import Network, traits_of

PREVIEW_IMAGES = 40
IMAGENET_CLASSES = 1000


class ClassTask:
    """Class labels; the null class is the last row of the label table.

    Attributes:
        dataset: the samples.
        drop_prob: probability that a sample is trained without its condition.
        channels: of the latents, known after `check`.
        draw_with: the command that draws images with what was trained, but for --config and --ckpt.
    """

    draw_with = "projects/sample/sample_c2i_ddp.py"

    def __init__(self, config: Config, vae: Autoencoder | None, device: torch.device) -> None:
        enc_dir, cached = config.model.enc_dir, has_features(config)
        traits = traits_of(config.model.network)
        self.dataset = build_c2i_dataset(config.data, enc_dir is not None and not cached, traits.num_classes)
        if enc_dir is not None and cached:
            self.dataset = CachedFeatures(self.dataset, config.data.dataset, config.model)
        self.vae, self.device = vae, device
        self.num_classes, self.drop_prob = traits.num_classes or self.dataset.num_labels, traits.class_dropout_prob

    def check(self, network: Network) -> None:
        """Compare latents, features and classes of the first sample that can be read with the network.

        Raises:
            ValueError: when they do not fit, or no sample can be read.
        """
        sample = first_readable(self.dataset, range(min(PROBED, len(self.dataset))))
        stored = "latent" in sample
        shape = check_latents(tuple(sample["latent" if stored else "image"].shape), network, None if stored else self.vae)
        self.channels, self.side = shape[0], traits_of(network).input_size or shape[-1]
        if "features" in sample:
            traits = traits_of(network)
            check_features(sample["features"], shape, traits.patch_size, traits.z_dim)
        if self.dataset.num_labels > self.num_classes or sample["label"] >= self.num_classes:
            raise ValueError(
                f"the dataset has {self.dataset.num_labels} classes, model.network.params.num_classes is {self.num_classes}"
            )

    def sampler(self, config: Config, **place: int) -> StepBatchSampler:
        """The order of samples of one rank; a global batch is any `batch_size` x accumulation x world of them.

        Args:
            place: keywords of `tim.data.sampler.BatchOrder`.
        """
        return StepBatchSampler(len(self.dataset), config.data.dataloader.batch_size, **place)

    def batch_sizes(self, configured: int) -> list[int]:
        """How many samples micro-batches have, of those that differ a number each.

        Args:
            configured: data.dataloader.batch_size.
        """
        return [configured]

    def prepare(self, batch: Batch, dropped: Tensor) -> Batch:
        """What of the conditions can be made ahead, in the thread of the prefetcher: the null class where dropped.

        Args:
            batch: on the host.
            dropped: (B,) bool, which samples lose their condition.

        Raises:
            ValueError: for a label that is no class.
        """
        label = batch["label"]
        largest = int(label.max())
        if largest >= self.num_classes or int(label.min()) < 0:
            step = int(batch["step"][0]) + 1
            raise ValueError(f"label {largest} of a sample of step {step} is out of range: num_classes is {self.num_classes}")
        return {**batch, "label": torch.where(dropped, self.num_classes, label)}

    def conditions(self, batch: Batch) -> tuple[dict, dict]:
        """Network keywords of a prefetched micro-batch, and those of its null condition: labels (B,)."""
        return {"y": batch["label"]}, {"y": torch.full_like(batch["label"], self.num_classes)}

    def preview(self, network: Network) -> tuple[dict, tuple[int, int], list[str]]:
        """Four images of each of the first ten classes, at the training size.

        Returns:
            their network keywords, height and width in pixels, and what each should show.
        """
        y = torch.arange(PREVIEW_IMAGES, device=self.device) % min(10, self.num_classes)
        side = self.side * (self.vae.factor if self.vae else 1)
        names = class_names(self.dataset, self.num_classes)
        return {"y": y}, (side, side), [names[k] for k in y.tolist()]

    def summary(self) -> str:
        """The data in a line."""
        return f"{len(self.dataset)} samples, {self.dataset.num_labels} classes"


class CaptionTask:
    """Captions through a frozen text encoder; the null condition is the empty caption."""

    draw_with = "projects/sample/sample_t2i.py --prompts 'YOUR PROMPT'"

    def __init__(self, config: Config, vae: Autoencoder | None, device: torch.device) -> None:
        from tim.models.caption_cache import build_text_encoder  # transformers takes seconds to import

        m, self.vae = config.model, vae
        self.dataset = build_t2i_dataset(config.data, (vae.factor if vae else 1) * traits_of(m.network).patch_size)
        captions = (caption for line in range(len(self.dataset)) for caption in self.dataset.captions(line))
        self.encoder = build_text_encoder(m, inference_dtype(config.training.mixed_precision, device), device, captions)
        self.drop_prob = m.proportion_empty_prompts
        self._turn = Lock()
        self.uncond_y, _ = self.encoder([""])  # (1, M, width)

    def check(self, network: Network) -> None:
        """Compare the width of the text features and the channels of the latents with the network."""
        traits_of(network).check_caption_width(self.encoder.width)
        first_readable(self.dataset, self.dataset.batches[0][:PROBED], "data.dataset.root_dir")
        self.channels = check_latents((3, *self.dataset.size(int(self.dataset.batches[0][0]))), network, self.vae)[0]

    def sampler(self, config: Config, **place: int) -> BucketBatchSampler:
        """The batches of packed_json."""
        return BucketBatchSampler(self.dataset.batches, **place)

    def batch_sizes(self, configured: int) -> list[int]:
        """Those of packed_json, whatever is configured."""
        return [len(batch) for batch in self.dataset.batches]

    def prepare(self, batch: Batch, dropped: Tensor) -> Batch:
        """Text features, those of the empty caption where dropped; text encoders read their masks, and the thread may wait."""
        captions = ["" if gone else caption for caption, gone in zip(batch["caption"], dropped.tolist(), strict=True)]
        y, y_mask = self._encode(captions)
        return {**batch, "y": y, "y_mask": y_mask}

    def conditions(self, batch: Batch) -> tuple[dict, dict]:
        """Text features (B, M, width) and mask (B, M)."""
        y = batch["y"]
        return {"y": y, "y_mask": batch["y_mask"]}, {"y": self.uncond_y.expand(len(y), -1, -1), "y_mask": None}

    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        with self._turn:  # tokenizers and caches are for one thread at a time, and previews need them too
            return self.encoder(captions)

    def preview(self, network: Network) -> tuple[dict, tuple[int, int], list[str]]:
        """Captions spread over the samples of the commonest size."""
        sizes = Counter(self.dataset.size(int(batch[0])) for batch in self.dataset.batches)
        size = max(sizes, key=lambda s: (sizes[s], s))
        lines = np.concatenate([batch for batch in self.dataset.batches if self.dataset.size(int(batch[0])) == size])
        lines = np.sort(lines)[np.linspace(0, len(lines) - 1, PREVIEW_IMAGES).astype(int)]
        captions = [self.dataset.captions(int(line))[0] for line in lines]
        y, y_mask = self._encode(captions)
        return {"y": y, "y_mask": y_mask}, size, captions

    def summary(self) -> str:
        """Images, and the packed batches that they come in."""
        sizes = {self.dataset.size(int(batch[0])) for batch in self.dataset.batches}
        of = f"{len(sizes)} size{'s' * (len(sizes) > 1)}"
        return f"{len(self.dataset)} captioned images in {len(self.dataset.batches)} packed batches of {of}"


Task: TypeAlias = ClassTask | CaptionTask


def class_names(dataset: LabelledSamples | None, num_classes: int) -> Sequence[str]:
    """What classes are called: as their folders, WordNet's numbers in words, and a thousand nameless ones as ImageNet's."""
    names: Sequence[str] | None = getattr(dataset, "class_names", None)
    if names is not None and len(names) != num_classes:
        names = None
    if names is None and num_classes != IMAGENET_CLASSES:
        return [f"class {k}" for k in range(num_classes)]
    if names is not None and not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data import ImageNetInfo  # takes seconds to import

    imagenet = ImageNetInfo()
    words = {synset: imagenet.label_name_to_description(synset) for synset in imagenet.label_names()}
    return list(words.values()) if names is None else [words.get(name, name) for name in names]


def check_latents(shape: tuple[int, ...], network: Network, vae: Autoencoder | None) -> tuple[int, ...]:
    """Compare the latents of an image of this shape (C, H, W), or a latent's own shape without `vae`, with the network.

    Returns:
        Their shape (C, h, w).
    """
    if vae is not None:
        shape = vae.latent_shape(*shape[1:])
    traits = traits_of(network)
    if traits.in_channels not in (None, shape[0]) or shape[1] % traits.patch_size or shape[2] % traits.patch_size:
        raise ValueError(
            f"latents are {shape}, but the network takes {traits.in_channels} channels and sides divisible by "
            f"patch_size={traits.patch_size}; check data.dataset.image_size, model.vae_dir and model.network.params"
        )
    return shape
