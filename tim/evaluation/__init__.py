"""Features, distances and scores of generated images: the paper's benchmarks and a small-scale check.

The defaults here are those of the commands, whose --help names them before anything heavy is imported.
"""

from pathlib import Path

BATCH = 64  # images a batch of feature extraction
CACHE = Path("workdir/features")  # folder of kept features
CLIP = "openai/clip-vit-large-patch14"
PROTOCOLS = ("tim", "clean", "torch-fidelity")  # how MJHQ-30K's FID resizes images
FEATURES = ("digits", "efficientnet", "inception")  # what two folders can be compared under
