"""Pack class folders of latents or images into tar shards, which data_type latent_tar and image_tar read.

build_shards.py --latent-dir DIR --out SHARDS packs latents; with --image-dir each latent gets its image beside it (REPA).
build_shards.py --image-dir DIR --out SHARDS packs images with their labels. Run it again to continue or to check.
"""

from pathlib import Path

from tim.cli import check_least, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    sources = parser.add_argument_group("what is packed")
    sources.add_argument("--latent-dir", help="DIR/<class>/<name>.safetensors")
    sources.add_argument("--image-dir", help="DIR/<class>/<name>.*")
    shards = parser.add_argument_group("shards")
    shards.add_argument("--out", type=usable_path, required=True, help="folder of the shards")
    shards.add_argument("--index-dir", help="folder of the index files (default: that of the shards)")
    shards.add_argument("--samples-per-shard", type=int, default=10000, help="the last shard may hold fewer")
    shards.add_argument("--name", default="shard", help="shards are called NAME-00000-of-00010.tar")
    shards.add_argument("--workers", type=int, default=4, help="shards packed at once")
    args = parser.parse_args()
    check_least(args, workers=1, samples_per_shard=1)
    if Path(args.name).name != args.name:
        raise ValueError(f"--name {args.name!r} must be the beginning of a file name; --out says where the shards go")

    from tim.preparation.packing import build_shards, list_sources

    samples = list_sources(args.latent_dir, args.image_dir)
    paths, made = build_shards(samples, args.out, args.samples_per_shard, args.name, args.index_dir, args.workers)
    print(f"{len(samples)} samples in {len(paths)} shards, {made} packed now, {len(paths) - made} were there")
    index = f" data.dataset.index_dir={args.index_dir}" if args.index_dir else ""
    print(f"data.data_type={'image' if args.latent_dir is None else 'latent'}_tar data.dataset.shard_dir={args.out}{index}")


if __name__ == "__main__":
    run_command(main)
