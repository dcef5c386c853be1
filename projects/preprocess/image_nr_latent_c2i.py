"""Encode class folders of images at native resolution: image_nr_latent_c2i.py --config FILE --project_dir DIR [a.b=c ...]"""

from tim.cli import preprocess_command, run_command

if __name__ == "__main__":
    run_command(lambda: preprocess_command(__doc__, "Native"))
