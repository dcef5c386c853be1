"""Turn images with captions into the text-to-image format: data_info.jsonl and bucket_sampler.json.

SOURCE is a folder with name.txt (a caption a line) beside name.png; a .jsonl with image_file and captions (or caption);
or webdataset tar shards (a folder of them will do), whose images are unpacked to the root folder.
"""

from tim.cli import check_least, command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", nargs="+", type=usable_path, metavar="SOURCE", help="captioned images")
    parser.add_argument("--out", type=usable_path, required=True, help="folder of the two files")
    parser.add_argument(
        "--root", type=usable_path, help="folder of the images (default: SOURCE, its folder, or OUT/images for tars)"
    )
    layout = parser.add_argument_group("buckets")
    layout.add_argument("--area", type=int, default=512, help="side of the square whose area the buckets have")
    layout.add_argument("--factor", type=int, default=32, help="pixels per token along a side")
    size = layout.add_mutually_exclusive_group(required=True)
    size.add_argument("--tokens-per-batch", type=int, help="tokens of a batch in every bucket")
    size.add_argument("--batch-size", type=int, help="images of a batch in the square bucket; others have as many tokens")
    layout.add_argument("--native", action="store_true", help="every image keeps its own size, floored, up to the area")
    layout.add_argument("--max-aspect", type=float, help="longest over shortest side of a bucket (default: 4)")
    layout.add_argument("--min-bucket", type=int, default=1, help="merge buckets of fewer images into the nearest")
    layout.add_argument("--no-upscale", action="store_true", help="leave out images smaller than their bucket")
    layout.add_argument("--seed", type=int, default=0, help="of the shuffle")
    args = parser.parse_args()
    if args.native and args.max_aspect is not None:
        raise ValueError("--max-aspect chooses the common buckets; --native has none")
    check_least(args, factor=1, tokens_per_batch=1, batch_size=1, min_bucket=1, seed=0)
    tokens = args.tokens_per_batch if args.batch_size is None else args.batch_size * (args.area / args.factor) ** 2

    from tim.preparation.buckets import build_buckets, write
    from tim.preparation.captioned import read

    records, skipped, root = read(args.source, args.root, args.out)
    buckets = build_buckets(
        records,
        area=args.area,
        factor=args.factor,
        tokens_per_batch=tokens,
        max_aspect=4.0 if args.max_aspect is None else args.max_aspect,
        min_bucket=args.min_bucket,
        seed=args.seed,
        upscale=not args.no_upscale,
        native=args.native,
    )
    jsonl, packed = write(buckets, args.out)
    print(buckets.table())
    left_out = skipped + buckets.left_out
    if left_out:
        print(f"{len(left_out)} images are not used:", *left_out[:10], *["..."] * (len(left_out) > 10), sep="\n  ")
    print(f"data.dataset.root_dir={root} data.dataset.jsonl_dir={jsonl} data.dataset.packed_json={packed}")


if __name__ == "__main__":
    run_command(main)
