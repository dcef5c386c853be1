"""Draw images of your own prompts at any sizes and numbers of steps, with a labelled grid of each size."""

from dataclasses import replace

from tim.cli import command_parser, run_command
from tim.generation.settings import add_sample_arguments, settings_from


def main() -> None:
    parser = command_parser(__doc__)
    parser.conflict_handler = "resolve"  # --num-steps takes several
    add_sample_arguments(parser)
    own = parser.add_argument_group("prompts and runs")
    source = own.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompts", nargs="+", metavar="TEXT", help="prompts; an empty one is the null caption")
    source.add_argument("--prompt-file", help="text file with one prompt a line")
    own.add_argument("--size", nargs="+", metavar="HxW", help="height x width in pixels, any number of sizes")
    own.add_argument("--num-steps", nargs="+", type=int, default=[4], help="any number of step counts (default: 4)")
    own.add_argument("--images-per-prompt", type=int, default=1, help="images of a prompt, each of its own seed")
    own.add_argument("--text-padding", choices=("mask", "batch"), help="default: the config's, else mask")
    args = parser.parse_args()

    from tim.generation.prompt_sets import PromptFilesJob, read_prompts
    from tim.generation.t2i import draw, finish_prompts, parse_size

    prompts = args.prompts or read_prompts(args.prompt_file)
    sizes = [parse_size(text) for text in args.size] if args.size else [(args.height, args.width)]
    steps, args.num_steps = args.num_steps, args.num_steps[0]
    job = PromptFilesJob(prompts, args.images_per_prompt)
    args.num_fid_samples = job.groups * job.per_group
    base = settings_from(args)
    runs = [replace(base, height=h, width=w, num_steps=n) for h, w in sizes for n in steps]
    folders = draw(args, job, runs, prefix="prompts-")
    finish_prompts(job, folders, steps)


if __name__ == "__main__":
    run_command(main)
