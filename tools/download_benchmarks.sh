#!/usr/bin/env bash
# Fetch what the text-to-image benchmarks need: prompts to datasets/, networks that judge to checkpoints/.
# Run it again to continue; what is there and whole is skipped.
#   download_benchmarks.sh [--only NAME ...] [--with-images] [--dry-run]
#     geneval       GenEval's 553 prompts
#     dpg           DPG-Bench's 1,065 prompts and its questions
#     mjhq          MJHQ-30K's prompts
#     mjhq-images   MJHQ-30K's 30,000 reference pictures, 3.6 GB; with --with-images or --only mjhq-images
#     inception     Inception-2015-12-05 for FID, 96 MB twice (.pth and .pb)
#     detector      Mask2Former Swin-S of mmdetection, GenEval's detector, 0.3 GB
#   HF_ENDPOINT and DOWNLOAD_MIRROR choose mirrors, see tools/download.sh.
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"
options "geneval dpg mjhq inception detector" mjhq-images "$@"

ELLA=TencentQQGYLab/ELLA
MJHQ="$HF_ENDPOINT/datasets/playgroundai/MJHQ-30K/resolve/main"
MMDET=https://download.openmmlab.com/mmdetection/v2.0/mask2former
DETECTOR=mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco

if wanted geneval; then
  fetch "$GITHUB_RAW/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl" datasets/geneval/evaluation_metadata.jsonl lines:553
fi
if wanted dpg; then
  fetch "$GITHUB_RAW/$ELLA/main/dpg_bench/dpg_bench.csv" datasets/dpg_bench/dpg_bench.csv head:item_id,
  fetch_unpacked "https://github.com/$ELLA/archive/refs/heads/main.tar.gz" datasets/dpg_bench/prompts gzip dpg_bench/prompts
fi
if wanted mjhq; then
  fetch "$MJHQ/meta_data.json" datasets/mjhq30k/meta_data.json json:30000
fi
if wanted mjhq-images; then
  fetch_unpacked "$MJHQ/mjhq30k_imgs.zip" datasets/mjhq30k/images \
    sha256:dacdc4328f294696ef0ee389be4bcf3fc96d112060ef10c13384836b54d4a8ec
fi
if wanted inception; then
  fetch_inception
fi
if wanted detector; then
  # openmmlab and torch name files by the first digits of their sha256
  fetch "$MMDET/$DETECTOR/${DETECTOR}_20220504_001756-743b7d99.pth" "checkpoints/mask2former/$DETECTOR.pth" sha256:743b7d99
fi
