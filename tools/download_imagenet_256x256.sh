#!/usr/bin/env bash
# Fetch what evaluating ImageNet 256x256 needs: ADM's reference batch and the Inception network.
# Run it again to continue; what is there and whole is skipped.
#   download_imagenet_256x256.sh [--only NAME ...] [--dry-run]
#     reference   datasets/imagenet/VIRTUAL_imagenet256_labeled.npz, 10,000 images and statistics of all, 2 GB
#     inception   Inception-2015-12-05 to checkpoints/, 96 MB twice (.pth and .pb)
#   HF_ENDPOINT and DOWNLOAD_MIRROR choose mirrors, see tools/download.sh.
# ImageNet itself needs an account: https://image-net.org
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"
options "reference inception" "" "$@"

if wanted reference; then
  fetch "$ADM_BATCHES/imagenet/256/VIRTUAL_imagenet256_labeled.npz" datasets/imagenet/VIRTUAL_imagenet256_labeled.npz zip
fi
if wanted inception; then
  fetch_inception
fi
imagenet_note 256 latents_sd_vae_256
