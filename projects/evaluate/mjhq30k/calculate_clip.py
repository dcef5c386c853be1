"""CLIP score of MJHQ-30K: calculate_clip.py META.json F.safetensors --save-stats, then calculate_clip.py F.safetensors DIR

The first form writes the text features of all prompts, the second compares the images of DIR (category/key.*) with them.
"""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import DEFAULT_CLIP, add_extract_arguments, check_positive, result_path, start


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, metavar="META.json|F.safetensors", help="prompts or their features")
    parser.add_argument("target", type=Path, metavar="F.safetensors|DIR", help="features to write, or images")
    parser.add_argument("--save-stats", action="store_true", help="write text features and stop")
    parser.add_argument(
        "--clip-model", default=DEFAULT_CLIP, help="transformers folder or hub id, or open_clip:ARCHITECTURE:TAG"
    )
    add_extract_arguments(parser)
    args = parser.parse_args()
    check_positive(args)

    from tim.evaluation.clip import load_clip
    from tim.evaluation.clip_score import clip_score, read_text_features, write_text_features
    from tim.evaluation.mjhq import table
    from tim.evaluation.record import write_result

    state = start()
    clip = load_clip(args.clip_model, state.device)
    if args.save_stats:
        if state.is_main_process:
            print(f"{write_text_features(args.source, args.target, clip)} text features in {args.target}")
        return
    text = read_text_features(args.source, clip)
    result = clip_score(text, args.target, clip, state, args.cache, args.batch_size, args.workers)
    if result is not None:
        path = result_path(args.out, args.target, "clip")
        write_result(path, "mjhq-clip", result)
        print(table(result["scores"], "CLIP", result["images_by_category"]))
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
