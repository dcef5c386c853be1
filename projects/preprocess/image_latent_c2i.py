"""Encode class folders of images, centre-cropped: image_latent_c2i.py --config FILE --project_dir DIR [a.b=c ...]"""

from tim.cli import run_command
from tim.preparation.command import preprocess_square

if __name__ == "__main__":
    run_command(preprocess_square)
