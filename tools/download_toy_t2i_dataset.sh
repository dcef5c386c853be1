#!/usr/bin/env bash
# Fetch a small set of captioned pictures to try text-to-image training, in the format of docs/data.md:
# datasets/t2i_toy_dataset/{images,data_info.jsonl,bucket_sampler.json}. Run it again to continue.
#   download_toy_t2i_dataset.sh [--only NAME] [--dry-run]
#     hub    the set published with TiM (default); TIM_TOY_REPO names the hub repository (default Good-Fellow/TiM-Toy-T2I-Dataset)
#     coco   5,000 photographs of COCO val2017 with five captions each, 1.1 GB, in buckets of about 512x512
#   HF_ENDPOINT and DOWNLOAD_MIRROR choose mirrors, see tools/download.sh.
source "$(dirname "${BASH_SOURCE[0]}")/download.sh"
options hub coco "$@"

TIM_TOY_REPO="${TIM_TOY_REPO:-Good-Fellow/TiM-Toy-T2I-Dataset}"
COCO=http://images.cocodataset.org # its certificate belongs to another host, so the checksums are what is trusted
DIR=datasets/t2i_toy_dataset

if [ "$DRY_RUN" = 0 ] && [ -d "$DIR/images" ] && [ -f "$DIR/data_info.jsonl" ] && [ -f "$DIR/bucket_sampler.json" ]; then
  echo "have $DIR"
elif wanted coco; then
  fetch_unpacked "$COCO/zips/val2017.zip" "$DIR/images" sha256:4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05
  captions="$COCO/annotations/annotations_trainval2017.zip"
  if ! { plan "$captions" "$DIR/data_info.jsonl" && plan "$captions" "$DIR/bucket_sampler.json"; }; then
    fetch "$captions" "$DIR/annotations.zip" sha256:113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268
    files coco "$DIR/annotations.zip" "$DIR/captions.jsonl"
    "$PYTHON" tools/build_t2i_buckets.py "$DIR/captions.jsonl" --root "$DIR/images" --out "$DIR" \
      --area 512 --factor 32 --tokens-per-batch 16384
    rm "$DIR/annotations.zip"
  fi
else
  url="$HF_ENDPOINT/datasets/$TIM_TOY_REPO"
  if ! { plan "$url" "$DIR/images" && plan "$url" "$DIR/data_info.jsonl" && plan "$url" "$DIR/bucket_sampler.json"; }; then
    echo "$(mirrored "$url") -> $DIR"
    HF_ENDPOINT="$(mirrored "$HF_ENDPOINT")" files hub "$TIM_TOY_REPO" "$DIR"
  fi
fi
