"""FID, sFID, inception score, precision and recall as ADM measures them: adm_evaluator.py REF SAMPLES

REF: an .npz of ADM (images and/or statistics) or a folder of real images. SAMPLES: a folder of images or an .npz.
"""

from pathlib import Path

from tim.cli import command_parser, run_command
from tim.evaluation.command import add_inception_arguments, check_positive, precision_of, result_path, start


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("reference", metavar="REF", type=Path, help="real images or statistics")
    parser.add_argument("samples", metavar="SAMPLES", type=Path, help="generated images")
    add_inception_arguments(parser)
    args = parser.parse_args()
    check_positive(args)

    from tim.evaluation.adm import Extraction, evaluate, table
    from tim.evaluation.inception import load_inception
    from tim.evaluation.record import write_result

    state = start()
    how = Extraction(
        load_inception(args.inception, state.device), state, args.precision, args.cache, args.batch_size, args.workers
    )
    with precision_of(args.precision, state.device):
        result = evaluate(args.reference, args.samples, how)
    if result is not None:
        path = result_path(args.out, args.samples, "adm")
        write_result(path, "adm", result)
        print(table(result))
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
