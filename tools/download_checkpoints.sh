#!/usr/bin/env bash
# Fetch published weights to checkpoints/: the REPA target for training, TiM for sampling.
# Run it again to continue; what is there and whole is skipped.
#   download_checkpoints.sh [--only NAME ...] [--dry-run]
#     radio     RADIO-v2.5-b, the target of REPA, 0.65 GB
#     c2i-256   TiM-XL/2, ImageNet 256x256, up to 2.7 GB
#     c2i-512   TiM-XL/1, ImageNet 512x512, up to 2.7 GB
#     t2i       TiM-XL/1, text to image, up to 3.5 GB
#   TIM_C2I_REPO and TIM_T2I_REPO are the hub repositories of TiM (default Good-Fellow/TiM-C2I and Good-Fellow/TiM-T2I).
#   HF_ENDPOINT and DOWNLOAD_MIRROR choose mirrors, see tools/download.sh.
# Autoencoders, text encoders and CLIP are named by hub id in configurations and fetched on first use.
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"
options "radio c2i-256 c2i-512 t2i" "" "$@"

TIM_C2I_REPO="${TIM_C2I_REPO:-Good-Fellow/TiM-C2I}"
TIM_T2I_REPO="${TIM_T2I_REPO:-Good-Fellow/TiM-T2I}"

if wanted radio; then
  fetch "$HF_ENDPOINT/nvidia/RADIO/resolve/main/radio-v2.5-b_half.pth.tar" checkpoints/radio/radio-v2.5-b_half.pth.tar \
    sha256:6bff4bd732d815136652d454598e8fe6c6f4e658716d5e6a697f0e6b60bd8a98
fi
if wanted c2i-256; then
  fetch_weights "$TIM_C2I_REPO" c2i_model_256
fi
if wanted c2i-512; then
  fetch_weights "$TIM_C2I_REPO" c2i_model_512
fi
if wanted t2i; then
  fetch_weights "$TIM_T2I_REPO" t2i_model
fi
