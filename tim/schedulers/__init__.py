SAMPLE_TYPES = ("transition", "diffusion")  # what a sampling step is conditioned on: where it ends (r), or where it starts
