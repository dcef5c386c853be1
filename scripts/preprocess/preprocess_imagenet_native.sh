#!/usr/bin/env bash
# Encode ImageNet at native resolution into DC-AE latents; run it again to continue. --help lists the environment variables that change the run.
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
preprocess image_nr_latent_c2i imagenet_native_dc_ae "$@"
