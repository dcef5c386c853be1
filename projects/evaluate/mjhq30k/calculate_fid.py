"""FID of MJHQ-30K, overall and by category: calculate_fid.py REF DIR, or calculate_fid.py REF OUT.npz --save-stats

REF and DIR: folders with one subfolder a category, or statistics written with --save-stats.
"""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import add_inception_arguments, check_positive, precision_of, result_path, start


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("reference", metavar="REF", type=Path, help="real images or statistics")
    parser.add_argument("samples", metavar="DIR", type=Path, help="generated images, or the file to write")
    parser.add_argument("--protocol", choices=("tim", "clean", "torch-fidelity"), default="tim", help="how images are resized")
    parser.add_argument("--save-stats", action="store_true", help="write the statistics of REF and stop")
    add_inception_arguments(parser)
    args = parser.parse_args()
    check_positive(args)

    from tim.evaluation import mjhq
    from tim.evaluation.adm import Extraction
    from tim.evaluation.inception import load_inception
    from tim.evaluation.record import write_result

    state = start()
    network = load_inception(args.inception, state.device)
    how = Extraction(network, state, args.precision, args.cache, args.batch_size, args.workers)
    with precision_of(args.precision, state.device):
        reference = mjhq.read_set(args.reference, args.protocol, how, "reference")
        samples = None if args.save_stats else mjhq.read_set(args.samples, args.protocol, how, "samples")
    if not state.is_main_process:
        return
    if samples is None:
        mjhq.save_statistics(args.samples, reference, args.protocol, network.weights_sha256)
        print(f"wrote {args.samples}")
        return
    path = result_path(args.out, args.samples, f"fid-{args.protocol}")
    result = mjhq.compare(reference, samples)
    write_result(path, f"mjhq-fid-{args.protocol}", mjhq.record(result, reference, samples, args.protocol, how))
    print(mjhq.table(result, "FID", samples.counts()))
    print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
