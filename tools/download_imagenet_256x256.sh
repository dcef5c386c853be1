#!/usr/bin/env bash
# Fetch SD-VAE latents of ImageNet 256x256, ready to train on, to datasets/imagenet1k/sd-vae-ft-ema-256x256. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
exec "$PYTHON" tools/download.py imagenet_256x256 "$@"
