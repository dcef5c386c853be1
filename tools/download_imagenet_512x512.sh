#!/usr/bin/env bash
# Fetch DC-AE latents of ImageNet 512x512, ready to train on, to datasets/imagenet1k/dc-ae-f32c32-sana-1.1-diffusers-512x512. --help says more.
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/common.sh"
exec "$PYTHON" tools/download.py imagenet_512x512 "$@"
