#!/usr/bin/env bash
# Encode ImageNet at 512x512 into DC-AE latents; run it again to continue. --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
preprocess image_latent_c2i imagenet_512_dc_ae "$@"
