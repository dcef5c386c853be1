"""What half precision and channels last cost an autoencoder on pictures, and what they save: PSNR and time of a round trip."""

from tim.cli import check_least, command_parser, run_command


def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("images", metavar="DIR", help="folder of .png or .jpg files, or of folders of them")
    parser.add_argument("--vae", required=True, help="diffusers folder or hub id")
    parser.add_argument("--random", action="store_true", help="the architecture of this id with random weights")
    parser.add_argument("--size", type=int, default=256, help="side of the square in the middle that is taken")
    parser.add_argument("--limit", type=int, default=16, help="pictures, spread evenly over the folder")
    args = parser.parse_args()
    check_least(args, size=1, limit=1)

    import numpy as np
    import torch

    from tim.benchmarks.measure import timed
    from tim.benchmarks.sampling import load_vae, psnr
    from tim.data.c2i import load_square
    from tim.distributed import best_device
    from tim.listing import list_files
    from tim.models.autoencoders import Autoencoder

    files = list_files(args.images, (".png", ".jpg", ".jpeg"), deep=True)
    if not files:
        raise ValueError(f"no .png or .jpg file in {args.images}")
    chosen = np.unique(np.linspace(0, len(files) - 1, args.limit).astype(int))
    pictures = torch.stack([load_square(files[k], args.size, flip=False) for k in chosen])
    device = best_device()
    precisions = ("float32", "bfloat16") if device.type == "cpu" else ("float32", "bfloat16", "float16")  # slow on CPUs

    def round_trip(precision: str, channels_last: bool) -> tuple[float, torch.Tensor]:
        """Seconds a picture, and the pictures that come back; those of KL autoencoders by the mean of the posterior."""
        torch.manual_seed(0)
        load = load_vae if args.random else Autoencoder.from_pretrained
        vae = load(args.vae, getattr(torch, precision), device)
        vae.configure(channels_last=channels_last)
        noise = torch.zeros(1, *vae.latent_shape(args.size, args.size))
        images = torch.cat([vae.decode(vae.encode(x[None], noise)).cpu() for x in pictures])
        return timed(lambda: vae.decode(vae.encode(pictures[:1], noise)), device, repeats=3, warmup=0)[0], images

    exact = round_trip("float32", False)[1]
    print(f"{len(pictures)} pictures of {args.size}x{args.size}, {device.type}{', random weights' if args.random else ''}")
    print(f"{'':>24} {'dB to float32':>14} {'dB to picture':>14} {'s a picture':>12}")
    for precision in precisions:
        for channels_last in (False, True):
            seconds, images = round_trip(precision, channels_last)
            name = f"{precision}{', channels last' if channels_last else ''}"
            print(f"{name:>24} {psnr(images, exact):>14.1f} {psnr(images, pictures):>14.1f} {seconds:>12.3f}")


if __name__ == "__main__":
    run_command(main)
