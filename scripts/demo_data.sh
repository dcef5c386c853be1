# Sourced by scripts that train on pictures out of Python packages.

# captioned_data NAME PICTURES SIZE AREA BATCH: datasets/NAME in batches of BATCH images of about AREA² pixels, and a text encoder.
captioned_data() {
  local data="datasets/$1"
  if [ ! -f "$data/bucket_sampler.json" ]; then
    "$PYTHON" tools/prepare_demo_data.py "$2" --out "$data" --size "$3"
    "$PYTHON" tools/build_t2i_buckets.py "$data/captions.jsonl" --root "$data/images" --out "$data" \
      --area "$4" --factor 8 --batch-size "$5" --max-aspect 2 --min-bucket 16
  fi
  if [ ! -f datasets/all-MiniLM-L6-v2/config.json ]; then
    "$PYTHON" tools/prepare_demo_data.py text-encoder --out datasets/all-MiniLM-L6-v2
  fi
}
