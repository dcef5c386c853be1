"""What a micro-batch is, from the loader to the loss."""

from typing import TypedDict

from torch import Tensor


class Batch(TypedDict, total=False):
    """A micro-batch of B samples of one rank; the loader collates it from samples with the same keys.

    What is trained on, as the dataset has it; tensors are on the GPU once prefetched, where there is one:

    Attributes:
        latent: (B, C, h, w) float32, stored latents.
        image: (B, C, H, W) float32 in [-1, 1]: to encode, to train on as it is, or for REPA's encoder beside a latent.
        features: (B, N, D) in the stored dtype, REPA features made before.

        label: (B,) int64, the class; class-conditional data. Once prefetched the null class, where it is dropped.
        caption: B strings, one of each sample's captions; text-to-image data.
        mirrored: (B,) bool, whether image, latent and features are those of the mirrored file.

        index: (B,) int64, which sample of the dataset each is.
        step: (B,) int64, the same for all: optimiser steps before this one.
        position: (B,) int64, increasing: places in the global batch, to which all random numbers belong.
        total: (B,) int64, the same for all: size of the global batch.
        problem: B strings, why the wanted sample could not be read and another stands in; empty where it could.

    The random numbers of the step, functions of (seed, step, position), made beside the step before it:

        times: (B, 2) standard normals of the interval's ends, on the host.
        dropped: (B,) bool, whether a sample loses its condition.
        noise: (B, C, h, w) standard normals, z. posterior: like it, of the autoencoder's posterior where images are encoded.
        guidance: (B, 4) uniform draws, of the guidance that a network takes as input.

    And of captions, those that are dropped being empty:

        y: (B, M, width), text features. y_mask: (B, M) bool, the real tokens; None when all are.
    """

    latent: Tensor
    image: Tensor
    features: Tensor
    label: Tensor
    caption: list[str]
    mirrored: Tensor
    index: Tensor
    step: Tensor
    position: Tensor
    total: Tensor
    problem: list[str]
    times: Tensor
    dropped: Tensor
    noise: Tensor
    posterior: Tensor
    guidance: Tensor
    y: Tensor
    y_mask: Tensor | None
